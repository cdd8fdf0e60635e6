#!/usr/bin/env bash
# Every figure of the docs that needs a GPU, section by section, each with a log and a limit of its own. One GPU works on one
# section at a time; several GPUs take several calls. A section that was cut goes on in a second call with the same OUT.
#
# usage: benchmarks/run_all.sh OUT SECTION...
#   training       steps of an 8B shape at 31k and 128k tokens, beside PEFT (training_long: 256k, 512k, and 1M on 4 of 32 layers)
#   recipe         SEAL's 50 samples of 31k tokens on a 7B shape, from end to end
#   decode masks headline hard models lengths      suites of `seal bench`
#   variants       decoding kernels, every variant (nvcc)
#   serving        `generate` unmerged: 8B shape at 2k x 4 and 32k x 1
#   quantized      4-bit training: weak columns, QLoRA, SEAL-C
#   sequence_parallel  a sample of 256k tokens (LENGTH) divided among GPUS=4 by DeepSpeed's Ulysses, then on one GPU
#   decoding       batched greedy decoding of a model (MODEL)
#   study context study4   SmolLM2's studies: real_model.md, context_extension.md, qeft.md (MODEL, TEXT, TEXT_LONG, PROCESSES)
# environment: SECONDS_EACH=300 (a section's limit), PYTHON, PACKAGE (an installed seal_ops), FA3=DIR, MODEL=DIR, TEXT=FILE,
#   TEXT_LONG=FILE, PROCESSES=4 (a study's processes on this GPU), BENCH_FLAGS (more words for `seal bench`)
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/run_all.sh OUT SECTION...}")
shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3} limit=${SECONDS_EACH:-300} processes=${PROCESSES:-4}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH="${PACKAGE:+$PACKAGE:}${PYTHONPATH:-}"
[ -n "${PACKAGE:-}" ] || export PYTHONPATH="$root:$PYTHONPATH"
cd "$out" # not the checkout, whose seal_ops would hide the package
fa3=(${FA3:+--fa3 "$FA3"})
status=0

step() { # name, words: runs them with the limit, says the end of the log
  local name=$1 begin=$SECONDS code
  shift
  timeout -k 5 "$limit" "$@" >>"$out/$name.log" 2>&1
  code=$?
  [ $code -eq 0 ] || status=1
  printf '== %-16s code %-3d %4d s (ends at %s)\n' "$name" $code $((SECONDS - begin)) "$(date +%T)"
  tail -n "${TAIL:-14}" "$out/$name.log" | cut -c1-230
}
bench() { # suite, name of the files, more words
  local suite=$1 name=$2
  shift 2
  # shellcheck disable=SC2086
  step "bench-$name" "$python" -m seal_ops.bench --suite "$suite" --output "$out/bench" --name "$name" --resume --budget-s $((limit - 20)) "$@" ${BENCH_FLAGS:-}
}
study() { # preset, folder, text: as many processes as PROCESSES, in one folder
  local begin=$SECONDS preset=$1 folder=$2 text=$3 number
  for number in $(seq "$processes"); do
    timeout -k 5 "$limit" "$python" -m seal_ops study --preset "$preset" --model "$MODEL" --text "$text" --output "$out/$folder" \
      --workers 1 --budget-s $((limit - 25)) >>"$out/$folder-$number.log" 2>&1 &
  done
  wait
  printf '== %-16s %4d s, %d files (ends at %s)\n' "$folder" $((SECONDS - begin)) "$(find "$out/$folder" -name '*.json' | wc -l)" "$(date +%T)"
  tail -qn 2 "$out/$folder"-*.log | cut -c1-230
}

for section in "$@"; do
  case $section in
    training)
      bench training training --lengths 31744 --steps 2
      bench training training --lengths 131072 --steps 1 --only auto
      ;;
    training_long)
      bench training training-long --lengths 262144 --steps 0 --only auto
      bench training training-long --lengths 524288 --steps 0 --only auto
      bench training training-long --lengths 1048576 --steps 0 --only auto
      ;;
    recipe) step recipe "$python" "$root/benchmarks/paper_recipe.py" --output "$out/recipe.json" ;;
    decode | masks | headline | hard | models | lengths) bench "$section" "$section" "${fa3[@]}" ;;
    variants) step variants env PYTHONPATH="$root:$PYTHONPATH" "$python" "$root/tests/gpu/decode_variants.py" --triton ;;
    serving)
      step serving "$python" "$root/benchmarks/serving_speed.py" --sizes 8b --lengths 2048 --batch 4 --rounds 3 --output "$out/serving-2k.json"
      step serving "$python" "$root/benchmarks/serving_speed.py" --sizes 8b --lengths 32768 --batch 1 --rounds 2 --output "$out/serving-32k.json"
      ;;
    quantized) step quantized "$python" "$root/benchmarks/quantized_training.py" --output "$out/quantized.json" --budget-s $((limit - 15)) ${QUANTIZED_FLAGS:-} ;;
    sequence_parallel)
      words=("$root/benchmarks/sequence_parallel.py" --length "${LENGTH:-262144}")
      step sequence-gpus "$python" -m torch.distributed.run --nproc_per_node="${GPUS:-4}" "${words[@]}" ${SEQUENCE_FLAGS:-} --output "$out/sequence-gpus.json"
      step sequence-one "$python" -m torch.distributed.run --nproc_per_node=1 "${words[@]}" --steps 0 --gradient-checkpointing auto --against "$out/sequence-gpus.json" --output "$out/sequence-one.json"
      ;;
    decoding) step decoding "$python" "$root/benchmarks/decoding_speed.py" --model "$MODEL" --lengths 512 2048 8000 --cases 40 --tokens 24 --output "$out/decoding.json" ;;
    study) study smollm2 study "$TEXT" ;;
    context) study smollm2-context context "$TEXT_LONG" ;;
    study4) study smollm2-4bit study4 "$TEXT_LONG" ;;
    *)
      echo "a section must be one of those that the head of benchmarks/run_all.sh names, got $section" >&2
      exit 2
      ;;
  esac
done
exit $status
