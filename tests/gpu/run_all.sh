#!/usr/bin/env bash
# The whole GPU suite on a machine with a Hopper GPU, nvcc and a CUDA torch: builds the extension, runs the shared tests and
# the GPU tests on the cuda and triton backends, and compute-sanitizer. Took 15 minutes on one GPU
# with 28 cores while other work used the host; a table of the stages comes last, and each log ends with its slowest tests.
#
# usage: tests/gpu/run_all.sh [WORKDIR]     logs and JUnit files stay in WORKDIR (default: a new temporary folder)
#        SEAL_STAGES="build cuda ..."       only these of: build cuda triton alone memcheck racecheck synccheck
#        SEAL_PREBUILT=DIR                  no build: tests the package installed in DIR
#        SEAL_SECONDS=300                   time for everything together (default 1200)
#        SEAL_PART=2/3                      only the second third of the tests of the cuda and triton stages
#        SEAL_WORKERS=6                     processes of each suite, with pytest-xdist (default: by cores and GPUs)
# Several GPUs: the same command. It takes all that are visible (CUDA_VISIBLE_DEVICES=0,1,2,3 names some): the workers take turns on
# them, each sanitizer has another, and the two suites run at a time.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work/run"
python=${PYTHON:-python3}
stages=" ${SEAL_STAGES:-build cuda triton alone memcheck racecheck synccheck} "
for name in $stages; do
  case $name in build | cuda | triton | alone | memcheck | racecheck | synccheck) ;; *) echo "SEAL_STAGES must name stages, got $name" >&2; exit 2 ;; esac
done
declare -a table=()
status=0

left() { echo $((${SEAL_SECONDS:-1200} - SECONDS > 10 ? ${SEAL_SECONDS:-1200} - SECONDS : 10)); }
finish() {  # name, exit code, seconds, remark
  local verdict=passed
  [ "$2" -eq 0 ] || { verdict=FAILED; status=1; }
  [ "$2" -ne 77 ] || { verdict=skipped; }
  table+=("$(printf '%-10s %-8s %4d s  %s' "$1" "$verdict" "$3" "$4")")
  echo "${table[-1]}"
}

# ---- build, outside the checkout
package=${SEAL_PREBUILT:-$work/package}
if [ -z "${SEAL_PREBUILT:-}" ]; then
  mkdir -p "$work/source"
  (cd "$root" && tar -cf - --exclude=.git --exclude=./build --exclude='*.so' csrc seal_ops setup.py pyproject.toml README.md $(ls LICENSE* 2>/dev/null)) | tar -xf - -C "$work/source"
  begin=$SECONDS
  SEAL_BUILD_CUDA=1 "$python" -m pip install -q --no-build-isolation --no-deps --target "$package" "$work/source" >"$work/build.log" 2>&1
  code=$?
  finish build $code $((SECONDS - begin)) "$(tail -n 1 "$work/build.log" | cut -c1-90)"
  if [ $code -ne 0 ]; then tail -n 30 "$work/build.log"; exit 1; fi
fi

# ---- tests, from a copy without seal_ops beside it, so that the installed package is what runs
cp -r "$root/tests" "$root/csrc" "$work/run/"
cp "$root/pyproject.toml" "$root/setup.py" "$work/run/" 2>/dev/null
cd "$work/run"
export PYTHONPATH="$package${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 SEAL_TRITON_AUTOTUNE=0
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$work/triton-cache}"
# A build whose kernels do not load would only skip their tests: that is a failure here.
"$python" - >"$work/import.log" 2>&1 <<'PYTHON'
import sys
import seal_ops
from seal_ops.ops.dispatch import extension, has_cuda_kernels
loaded = extension()
print(seal_ops.__file__, loaded if isinstance(loaded, str) else loaded.build_facts())
sys.exit(not has_cuda_kernels())
PYTHON
finish import $? 0 "$(tail -n 1 "$work/import.log" | cut -c1-400)"

# One thread for each worker: more would only stand in each other's way.
export OMP_NUM_THREADS=1
report() {  # a stage that ran beside others: name, exit code, seconds
  echo "$2 $3" >"$work/$1.status"
  echo "$1 ended with code $2 after $3 s (at $SECONDS s)"
}
has() { "$python" -c "import $1" 2>/dev/null; }
suite() {  # cuda or triton, workers, per cent of the time that is left, pytest arguments: the most important first
  local name=$1 count=$2 begin=$SECONDS limit=$(($(left) * $3 / 100)) options=()
  shift 3
  [[ $stages == *" $name "* ]] || return 0
  has xdist && options+=(-n "$count" --dist load)
  # The session's limit ends between two tests, and reports; a test that hangs ends its worker, which says its name.
  has pytest_timeout && options+=(--session-timeout=$((limit > 60 ? limit - 20 : limit / 2)) --timeout=150 --timeout-method=thread)
  SEAL_SUITE=$name SEAL_GPUS=$gpus timeout -k 2 "$limit" "$python" -m pytest -vv -rs --tb=short --durations=25 -p no:cacheprovider \
    "${options[@]}" -m "not alone" --junitxml="$work/$name.xml" "$@" >"$work/$name.log" 2>&1
  report "$name" $? $((SECONDS - begin))
}
sanitizer() {  # tool, the GPU's number among those given, parts of sanitize.py
  local tool=$1 begin=$SECONDS code card
  card=$(cut -d, -f$(($2 % gpu_count + 1)) <<<"$gpus")
  shift 2
  [[ $stages == *" $tool "* ]] || return 0
  command -v compute-sanitizer >/dev/null || { echo "SUMMARY: compute-sanitizer is not installed" >"$work/$tool.log"; report "$tool" 77 0; return; }
  CUDA_VISIBLE_DEVICES=$card PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 2 "$(left)" compute-sanitizer --tool "$tool" --kernel-name kns=seal \
    --error-exitcode 9 --print-limit 2000 "$python" tests/gpu/sanitize.py "$@" >"$work/$tool.log" 2>&1
  code=$?
  [ "$tool" = racecheck ] && [ $code -eq 9 ] && { "$python" tests/gpu/known_races.py "$work/racecheck.log" >>"$work/racecheck.log"; code=$?; }
  report "$tool" $code $((SECONDS - begin))
}
gpus=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, -)}
gpus=${gpus:-0}
gpu_count=$(awk -F, '{print NF}' <<<"$gpus")
cores=$(env -u OMP_NUM_THREADS nproc) # which it would print
few=$((cores < 14 * gpu_count ? cores : 14 * gpu_count)) many=$((cores > 10 ? cores * 3 / 4 : 8))
shared=(tests/gpu/test_gpu_paths.py tests/gpu/test_gpu_grid.py tests/ops tests/gpu/test_gpu_rope.py tests/gpu/test_gpu_runtime.py tests/gpu)
rm -f "$work"/*.status
sanitizer memcheck 1 forward decode backward rope paths masks grid &
sanitizer racecheck 2 &
sanitizer synccheck 3 &
if [ "$gpu_count" -gt 1 ]; then
  suite cuda "${SEAL_WORKERS:-$few}" 100 "${shared[@]}" &
  suite triton "${SEAL_WORKERS:-$((cores / 2 > 8 ? cores / 2 : 8))}" 100 "${shared[@]}"
else  # one suite after the other: the processes of a GPU take turns on it, and Triton's compiler wants the cores
  both=100
  [[ $stages == *" triton "* ]] && both=55
  suite cuda "${SEAL_WORKERS:-$few}" $both "${shared[@]}"
  suite triton "${SEAL_WORKERS:-$many}" 100 "${shared[@]}"
fi
wait
# Times and memory in use, with the GPU to themselves.
if [[ $stages == *" alone "* ]]; then
  begin=$SECONDS
  CUDA_VISIBLE_DEVICES=${gpus%%,*} timeout -k 2 "$(left)" "$python" -m pytest -vv -s --tb=short -p no:cacheprovider -m alone tests/gpu >"$work/alone.log" 2>&1
  report alone $? $((SECONDS - begin))
fi
for name in cuda triton alone memcheck racecheck synccheck; do
  [ -e "$work/$name.status" ] || continue
  read -r code seconds <"$work/$name.status"
  finish "$name" "$code" "$seconds" "$(grep -E ' (passed|failed|error)|SUMMARY|not finite|^known_races' "$work/$name.log" | tail -n 1 | cut -c1-110)"
done

cat "$work"/cuda.log "$work"/triton.log "$work"/alone.log 2>/dev/null | grep -E '^(FAILED|ERROR)' | cut -c1-230 | head -n 40
echo
printf '%s\n' "${table[@]}"
printf 'all stages: %d s, logs in %s\n' $SECONDS "$work"
exit $status
