#!/usr/bin/env bash
# Builds the product's container images without a registry: scripts/images.sh [operator] [agent] [runtime] [builtin] [pause]
#
# All five by default, each as build/images/NAME.tar (docker-archive, midstream-NAME:test). The base is Debian 12 by
# debootstrap instead of the Dockerfile's default, Python packages come through this machine's own pip: what is built
# is the Dockerfile's all the same. Base, packages and layers are kept under $MIDSTREAM_CACHE; about 4 minutes once.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
cache=${MIDSTREAM_CACHE:-$HOME/.cache/midstream}/images
tag=test
"$top/scripts/setup.sh" images
mkdir -p "$cache" "$top/build/images"
exec 7>"$cache/lock"
flock 7

# A storage of its own, which no engine of this machine looks at. `chroot`: a build needs no namespaces here.
storage=(--root "$cache/storage" --runroot "$cache/run" --storage-driver overlay)
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=overlay TMPDIR=$cache

quietly() { # a log that is shown when the command fails
  local log=$cache/$1.log
  shift
  "$@" >"$log" 2>&1 </dev/null || { tail -n 30 "$log" >&2; return 1; }
}

base() { # Debian 12 of this machine's own mirrors
  buildah "${storage[@]}" inspect --type image localhost/midstream-base >/dev/null 2>&1 && return
  echo "images: Debian 12 by debootstrap"
  local root=$cache/base mirror
  mirror=$(apt-get indextargets --format '$(SITE)' 'Release: bookworm' 'Identifier: Packages' | head -n 1)
  rm -rf "$root"
  quietly base debootstrap --variant=minbase --include=ca-certificates bookworm "$root" "$mirror"
  rm -f "$root"/var/cache/apt/archives/*.deb
  apt-get indextargets --format 'deb $(SITE) $(RELEASE) main' 'Identifier: Packages' | sort -u |
    grep -E ' bookworm(-updates|-security)? ' >"$root/etc/apt/sources.list"
  tar -C "$root" -c . >"$cache/base.tar"
  rm -rf "$root"
  local container
  container=$(buildah "${storage[@]}" from scratch)
  buildah "${storage[@]}" add -q "$container" "$cache/base.tar" / >/dev/null
  buildah "${storage[@]}" config --cmd /bin/bash --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
  buildah "${storage[@]}" commit -q --rm "$container" localhost/midstream-base >/dev/null
  rm -f "$cache/base.tar"
}

wheels() { # requirements/NAME.txt, as this machine's pip gets them
  local name=$1 lock=$top/requirements/$1.txt folder
  folder=$cache/wheels-$name-$(sha256sum "$lock" | cut -c1-16)
  if [ ! -e "$folder/complete" ]; then
    echo "images: Python packages of $name" >&2
    rm -rf "$folder"
    quietly "wheels-$name" /usr/bin/python3 -m venv "$cache/pip"
    quietly "wheels-$name" "$cache/pip/bin/pip" download -q --disable-pip-version-check --only-binary=:all: --require-hashes -d "$folder" -r "$lock"
    touch "$folder/complete"
  fi
  echo "$folder"
}

declare -A lock_of=([operator]=operator [agent]=run [runtime]=run [builtin]=run)

build() {
  local name=$1 folder
  folder=$(wheels "${lock_of[$name]}")
  quietly "$name" buildah "${storage[@]}" bud --layers --pull-never --target "$name" --tag "localhost/midstream-$name:$tag" \
    --build-arg BASE=localhost/midstream-base --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels \
    --volume "$folder:/wheels:ro" --ignorefile "$top/.dockerignore" -f "$top/Dockerfile" "$top"
}

save() { # only what has changed since
  local name=$1 id
  id=$(buildah "${storage[@]}" inspect --type image --format '{{.FromImageID}}' "localhost/midstream-$name:$tag")
  [ "$(cat "$top/build/images/$name.id" 2>/dev/null)" != "$id" ] || [ ! -e "$top/build/images/$name.tar" ] || return 0
  rm -f "$top/build/images/$name.tar"
  quietly save buildah "${storage[@]}" push "localhost/midstream-$name:$tag" "docker-archive:$top/build/images/$name.tar:localhost/midstream-$name:$tag"
  echo "$id" >"$top/build/images/$name.id"
}

pause() { # what holds a pod's namespaces: one static program that waits and reaps
  local folder=$cache/pause container
  mkdir -p "$folder"
  gcc -Os -static -s -Wall -Wextra -Werror -o "$folder/pause" "$top/tests/testbed/kube/pause.c"
  container=$(buildah "${storage[@]}" from scratch)
  buildah "${storage[@]}" add -q "$container" "$folder/pause" /pause >/dev/null
  buildah "${storage[@]}" config --entrypoint '["/pause"]' --cmd '' "$container"
  buildah "${storage[@]}" commit -q --rm --timestamp 0 "$container" "localhost/midstream-pause:$tag" >/dev/null
}

[ $# -gt 0 ] || set -- operator agent runtime builtin pause
for name in "$@"; do
  case $name in
    pause) pause ;;
    operator | agent | runtime | builtin) base; echo "images: $name"; build "$name" ;;
    *) echo "images: no image '$name'; there are: operator agent runtime builtin pause" >&2; exit 2 ;;
  esac
  save "$name"
done
