#!/usr/bin/env bash
# Runs the parts of `make test` or `make bench`, each under a time limit of its own, all of them even when one fails,
# and prints at the end what each took: scripts/parts.sh test|bench
set -uo pipefail
cd "$(dirname "$0")/.."

declare -A limit_s=(
  [test-unit]=1200 [test-contract]=300 [test-csrc]=1200 [test-bpf]=900 [test-net]=2700 [test-e2e]=1500
  [test-cluster]=1800 [test-vllm]=1200 [test-gpu]=600
)
case ${1:-} in
  test) parts=(test-unit test-contract test-csrc test-bpf test-gpu test-net test-e2e test-cluster test-vllm) ;;
  bench) parts=(); for file in tests/bench/bench_*.py; do parts+=("$file"); done ;;
  *) echo "usage: scripts/parts.sh test|bench" >&2; exit 2 ;;
esac
[ -z "${LONG:-}" ] || for part in "${!limit_s[@]}"; do limit_s[$part]=14400; done

# The Go builds and the images take minutes and nothing before the Kubernetes tests needs them: beside the other parts,
# at low priority.
if [ "$1" = test ]; then
  mkdir -p build
  setsid nice -n 15 sh -c 'scripts/kube.sh; scripts/images.sh' >build/kube.log 2>&1 </dev/null &
  trap "kill -- -$! 2>/dev/null" EXIT
fi

seconds=() results=() failed=0
for part in "${parts[@]}"; do
  echo "==== $part"
  began=$SECONDS
  case $part in
    *.py) timeout --kill-after=30 1800 build/venv-dev/bin/python "$part" ;;
    *) timeout --kill-after=30 "${limit_s[$part]}" make --no-print-directory "$part" ;;
  esac </dev/null
  status=$?
  case $status in
    0) results+=(ok) ;;
    124 | 137) results+=("TIME LIMIT"); failed=1 ;;
    *) results+=("FAILED ($status)"); failed=1 ;;
  esac
  seconds+=($((SECONDS - began)))
done

echo "==== seconds a part"
for i in "${!parts[@]}"; do printf '%6d  %-32s %s\n' "${seconds[$i]}" "${parts[$i]}" "${results[$i]}"; done
printf '%6d  all\n' "$SECONDS"
exit $failed
