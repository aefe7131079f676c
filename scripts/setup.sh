#!/usr/bin/env bash
# Installs what a command needs, once, and says so: scripts/setup.sh [run|operator|dev] PART...
#
#   run, operator, dev   the Python environment of that name (requirements/NAME.txt), under $MIDSTREAM_CACHE
#   PART       a set of Debian packages: see the table below
#
# Prints nothing but what it does; does nothing when everything is there.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
cache=${MIDSTREAM_CACHE:-$HOME/.cache/midstream}

declare -A debian=(
  [run]="python3-venv python3-bpfcc python3-torch"
  [operator]="python3-venv"
  [dev]="python3-venv python3-bpfcc python3-torch"
  [build]="gcc make libc6-dev"
  [bpf]="linux-headers-amd64 kmod"
  [net]="iproute2 tcpdump nftables iptables conntrack ethtool curl util-linux libcap2-bin iputils-ping"
  [inspect]="strace bpftool"
  [sanitize]="clang-14 libclang-rt-14-dev llvm-14"
  [clients]="chromium nginx-light"
  [lint]="clang-format"
  [model]="spin gcc libc6-dev"
)

missing=()
environment=
for part in "$@"; do
  [ -n "${debian[$part]:-}" ] || { echo "setup: no part '$part'; there are: ${!debian[*]}" >&2; exit 2; }
  case $part in run|operator|dev) environment=$part ;; esac
  for package in ${debian[$part]}; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
done

mkdir -p "$cache"
exec 9>"$cache/setup.lock"
flock 9

if [ ${#missing[@]} -gt 0 ]; then
  [ "$(id -u)" = 0 ] || { echo "setup: root is needed to install ${missing[*]}" >&2; exit 1; }
  echo "setup: Debian packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  log=$cache/apt.log
  install() { apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 install -y --no-install-recommends "${missing[@]}"; }
  if ! { apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 update && install; } >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    echo "setup: apt could not install ${missing[*]} (whole output: $log)" >&2
    exit 1
  fi
fi

[ -n "$environment" ] || exit 0
lock=$top/requirements/$environment.txt
key=$(sha256sum "$lock" | cut -c1-16)
venv=$cache/$environment-$key
if [ ! -e "$venv/complete" ]; then
  echo "setup: Python environment '$environment' from $(basename "$lock")"
  rm -rf "$venv"
  /usr/bin/python3 -m venv "$venv"
  "$venv/bin/python" -m pip install -q --disable-pip-version-check --require-hashes -r "$lock"
  # bcc's bindings are Debian's: they belong to its libbcc and cannot be had from PyPI.
  ln -s /usr/lib/python3/dist-packages/bcc "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/bcc"
  touch "$venv/complete"
fi
mkdir -p "$top/build"
ln -sfn "$venv" "$top/build/venv-$environment"
