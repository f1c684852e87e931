#!/usr/bin/env bash
# Measures this package on one H100 or H200, in at most 15 minutes: bash benchmarks/gpu.sh OUT [PEER]
#
# OUT is a folder for JSON lines, traces and logs. PEER is a Python with torch (CUDA) and diffusers; without it the
# comparison is left away. PYTHON is that of this package, with the extra cuda (default: python). Every part has a limit
# of its own, and one that fails or runs out of time does not stop the others.
set -u
OUT=${1:?usage: bash benchmarks/gpu.sh OUT [PEER]}
PEER=${2:-}
PYTHON=${PYTHON:-python}
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$OUT/cache}
mkdir -p "$OUT"

# part NAME SECONDS COMMAND...: appends the command's output to OUT/NAME.jsonl
part() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" >>"$OUT/$name.jsonl" 2>"$OUT/$name.log"
    echo "$name: exit code $?, $((SECONDS - start)) s"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv >"$OUT/gpu.csv"

# The U-Net of the paper's decoder (512 channels) with its text encoder, its state sharded over nothing: smaller batches.
for batch in 16 32 64; do
    part paper_decoder 150 "$PYTHON" benchmarks/train_step.py --config configs/paper.py:decoder \
        --set "batch_size=$batch" --steps 8
done

# Karlo's decoder, without and with recomputation, and its prior.
for batch in 64 128 256; do
    part karlo_decoder 100 "$PYTHON" benchmarks/train_step.py --config configs/karlo.py:decoder \
        --set model.unet.remat=false --set "batch_size=$batch" --steps 8
done
part karlo_prior 90 "$PYTHON" benchmarks/train_step.py --config configs/karlo.py:prior --set batch_size=512 --steps 8

# Sampling at Karlo's size, four images: prior and decoder of 25 steps, upsampler of 7.
for stage in prior decoder upsampler_1; do
    part karlo_sample 100 "$PYTHON" benchmarks/sample.py --config "configs/karlo.py:$stage" --batch_size 4 --repeats 3
done

# The plan against the run on this GPU.
part plan_error 150 "$PYTHON" benchmarks/plan_error.py --config configs/karlo.py:decoder --set model.unet.remat=false \
    --batch_size 64

if [ -n "$PEER" ]; then
    part peers 150 "$PYTHON" benchmarks/peers.py --peer "$PEER" --dtype bfloat16 --compile --repeats 5 \
        --out "$OUT/peers.json"
fi
rm -rf "$OUT/cache"
