#!/usr/bin/env bash
# Installs what a command needs, once, and says so: scripts/setup.sh [run|operator|dev|vllm] PART...
#
#   run, operator, dev   the Python environment of that name (requirements/NAME.txt), under $MIDSTREAM_CACHE
#   vllm                 the same, with vLLM for the CPU; 6 GB, minutes. Where it cannot be had, build/venv-vllm is absent
#                        and build/vllm-absent.txt says why
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
  [vllm]="python3-venv"
  [build]="gcc make libc6-dev"
  [bpf]="linux-headers-amd64 kmod"
  [net]="iproute2 tcpdump nftables iptables conntrack ethtool curl util-linux libcap2-bin iputils-ping"
  [inspect]="strace bpftool iperf3"
  [sanitize]="clang-14 libclang-rt-14-dev llvm-14"
  [clients]="chromium nginx-light"
  [lint]="clang-format"
  [model]="spin gcc libc6-dev"
  [images]="buildah debootstrap gcc libc6-dev python3-venv"
  [nodes]="containerd runc"
)

missing=()
environment=
for part in "$@"; do
  [ -n "${debian[$part]:-}" ] || { echo "setup: no part '$part'; there are: ${!debian[*]}" >&2; exit 2; }
  case $part in run|operator|dev|vllm) environment=$part ;; esac
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
mkdir -p "$top/build"
absent=$top/build/$environment-absent.txt

no_vllm() { # a machine on which vLLM's tests are skipped by name
  echo "$1" >"$absent"
  rm -f "$top/build/venv-vllm"
  echo "setup: no vLLM on this machine: $1"
  exit 0
}

lock=$top/requirements/$environment.txt
server=$top/requirements/$environment-server.txt # not all have one
[ -e "$server" ] || server=/dev/null
key=$(cat "$lock" "$server" | sha256sum | cut -c1-16)
venv=$cache/$environment-$key
if [ "$environment" = vllm ]; then # takes minutes: nobody else waits for it
  exec 9>"$cache/vllm.lock"
  flock 9
fi
if [ ! -e "$venv/complete" ]; then
  if [ "$environment" = vllm ]; then
    grep -qw avx2 /proc/cpuinfo || no_vllm "the processor has no AVX2"
    [ "$(df --output=avail -BG "$cache" | tail -1 | tr -dc 0-9)" -ge 14 ] || no_vllm "less than 14 GB free under $cache"
  fi
  echo "setup: Python environment '$environment' from $(basename "$lock")"
  rm -rf "$venv"
  /usr/bin/python3 -m venv "$venv"
  pip() { nice "$venv/bin/python" -m pip install -q --disable-pip-version-check --require-hashes "$@"; }
  if [ "$environment" = vllm ]; then
    { pip -r "$lock" && pip --no-deps -r "$server"; } || no_vllm "the registry has not got all of $(basename "$lock")"
  else
    pip -r "$lock"
    # bcc's bindings are Debian's: they belong to its libbcc and cannot be had from PyPI.
    ln -s /usr/lib/python3/dist-packages/bcc "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/bcc"
  fi
  touch "$venv/complete"
fi
rm -f "$absent"
ln -sfn "$venv" "$top/build/venv-$environment"
