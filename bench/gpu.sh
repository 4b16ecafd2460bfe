#!/usr/bin/env bash
# Everything that needs a GPU, in stages of at most nine minutes: bench/gpu.sh STAGE OUT [--rehearse]
#
#   1 tests on CUDA       3 meta_step and memory, all settings     5 CIFAR-10, 1 image a class: from experts to accuracy
#   2 the table, kernels             4 experts, evaluation, trajectories      6 ImageNette at 128×128, 1 and 10 images a class, 8 GiB
#
# Records, logs and runs go to the folder OUT. A stage that its time cuts off exits with 75; called again, it goes on.
# --rehearse does the same on the CPU at toy size, in seconds. Environment, for stages 5 and 6:
#   DATA        folder of the data sets (default data; CIFAR-10 is fetched if it is not there)
#   EXPERTS     how many to train (20)     EPOCHS  of each (stage 5: 10, stage 6: 15)
#   ITERATIONS  of the distillation (stage 5: 1000, stage 6: 200)
#   SECONDS_MOST  time of a stage (520)    PYTHON  the interpreter (python)
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }
[ $# -ge 2 ] && [ $# -le 3 ] || fail "expected bench/gpu.sh STAGE OUT [--rehearse], found $# arguments"
stage=$1 out=$2 rehearse=${3:-}
[ -z "$rehearse" ] || [ "$rehearse" = --rehearse ] || fail "$rehearse: expected --rehearse or nothing"

mkdir -p "$out"
out=$(cd "$out" && pwd)
data=$(realpath -m "${DATA:-data}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
most=${SECONDS_MOST:-520}
device=cuda
toy=()
if [ -n "$rehearse" ]; then
    device=cpu
    toy=(--steps 2 --batch 3 --size 16 --depth 2 --width 4 --repetitions 1)
    export OMP_NUM_THREADS=1 # a toy is slower on several
fi

# Run the command in what is left of the stage's time; 75 if that is not enough. TERM: mtt_fast's jobs then save.
within() {
    local left=$((most - SECONDS)) status=0
    [ "$left" -gt 0 ] || return 75
    timeout --signal=TERM --kill-after=30 "$left" "$@" || status=$?
    case $status in 124 | 137) return 75 ;; *) return $status ;; esac
}

out_of_time() {
    echo "stage $stage: out of time; the same command goes on" >&2
    exit 75
}

# A benchmark whose record is not there yet. One that fails leaves its log, and the others go on.
failed=0
bench() {
    local name=$1 status=0; shift
    [ ! -e "$out/$name.json" ] || return 0
    echo "stage $stage: $name ($SECONDS s)"
    within "$python" -W ignore -m bench "$@" "${toy[@]}" --device $device --out "$out" --name "$name" \
        >"$out/$name.log" 2>&1 || status=$?
    [ $status -ne 75 ] || out_of_time
    [ $status -eq 0 ] || { failed=1; tail -n 1 "$out/$name.log" >&2; }
}

# The table of launch configurations anew, block by block, which is what goes into kernels/triton/ afterwards.
tune() {
    local setting precision block
    if [ -n "$rehearse" ]; then
        TRITON_INTERPRET=1 bench tune tune --blocks 2 --table "$out/configurations.toml" --candidates 1
        return
    fi
    for setting in cifar10-ipc10:3 tiny-ipc10:4 imagenet128-ipc10:5; do
        for precision in tf32 bf16; do
            for block in $(seq "${setting#*:}"); do
                bench "tune-${setting%:*}-$precision-$block" tune --setting "${setting%:*}" --precision $precision \
                    --blocks "$block" --table "$out/configurations.toml"
            done
        done
    done
}

# A distillation with its experts, from wherever it was.
distil() {
    local run=$1 status=0 resume=(); shift
    [ ! -e "$out/$run/config.toml" ] || resume=(--resume)
    within "$python" -W ignore -m mtt_fast.distill --out "$out/$run" "${resume[@]}" --device $device \
        --buffer_path "$out/buffers" "$@" || status=$?
    [ $status -ne 75 ] || out_of_time
    [ $status -eq 0 ] || exit $status
    cp "$out/$run/summary.json" "$out/$run.summary.json"
}

settings=(cifar10-ipc1 cifar10-ipc10 cifar10-ipc50 cifar100-ipc1 cifar100-ipc10 cifar100-ipc50
    tiny-ipc1 tiny-ipc10 tiny-ipc50 imagenet128-ipc1 imagenet128-ipc10 imagenet128-ipc50)

case $stage in
    1)
        if [ -n "$rehearse" ]; then tests=(tests/engine/test_matching.py); else tests=(-m gpu); fi
        status=0
        within "$python" -m pytest -q "${tests[@]}" --junit-xml="$out/tests-gpu.xml" >"$out/tests-gpu.log" 2>&1 || status=$?
        [ $status -ne 5 ] || fail "no test is marked gpu"
        if [ -z "$rehearse" ]; then
            within "$python" -m pytest -q tests/engine/test_unroll.py tests/engine/test_fused.py tests/engine/test_student.py \
                --junit-xml="$out/tests-engine.xml" >"$out/tests-engine.log" 2>&1 || status=$?
        fi
        tail -n 1 "$out"/tests-*.log
        exit $status
        ;;
    2)
        settings=(cifar10-ipc10 imagenet128-ipc10)
        if [ -n "$rehearse" ]; then settings=(cifar10-ipc10); fi
        tune
        for setting in "${settings[@]}"; do
            bench "kernels-$setting" kernels --setting "$setting"
        done
        ;;
    3)
        budget=8GiB
        names=whole_graph,checkpointed,truncated,generic,compiled,fused,fused-budget,fused-auto,fused-graph
        few=whole_graph,fused,fused-graph
        if [ -n "$rehearse" ]; then settings=(cifar10-ipc1) names=whole_graph,generic,fused few=whole_graph,fused; fi
        for setting in "${settings[@]}"; do
            bench "meta_step-$setting" meta_step --setting "$setting" --engines $names --memory-budget $budget
        done
        for precision in fp32 bf16; do # the others are in tf32
            bench "meta_step-cifar10-ipc10-$precision" meta_step --setting cifar10-ipc10 --engines $few --precision $precision
        done
        if [ -n "$rehearse" ]; then vary=(--vary-steps 2,3 --vary-batch 3 --vary-size 16); else vary=(); fi
        bench memory_scaling memory_scaling --setting cifar10-ipc10 "${vary[@]}"
        ;;
    4)
        if [ -n "$rehearse" ]; then images=32 experts=1 epochs=3; else images=50000 experts=10 epochs=50; fi
        bench experts experts --images $images
        bench evaluate evaluate
        bench trajectories trajectories --experts $experts --epochs $epochs
        ;;
    5)
        if [ -n "$rehearse" ]; then
            distil cifar10-ipc1 --recipe digits --model ConvNetD2W4 --num_experts 1 --train_epochs 4 --max_start_epoch 1 \
                --expert_epochs 1 --syn_steps 2 --Iteration 2 --num_eval 1 --epoch_eval_train 2
        else
            distil cifar10-ipc1 --recipe cifar10-ipc1 --data_path "$data" --download --num_experts "${EXPERTS:-20}" \
                --train_epochs "${EPOCHS:-10}" --Iteration "${ITERATIONS:-1000}" --eval_it 500 --save_seconds 20
        fi
        ;;
    6)
        for ipc in 1 10; do
            if [ -n "$rehearse" ]; then
                "$python" -m bench.pictures "$out/pictures"
                distil "imagenette-ipc$ipc" --dataset "$out/pictures" --res 16 --model ConvNetD2W4 --ipc $ipc --num_experts 1 \
                    --train_epochs 2 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2 --Iteration 1 --num_eval 1 \
                    --epoch_eval_train 1 --memory_budget 8GiB
            else
                distil "imagenette-ipc$ipc" --recipe "imagenette-ipc$ipc" --data_path "$data" --num_experts "${EXPERTS:-20}" \
                    --train_epochs "${EPOCHS:-15}" --Iteration "${ITERATIONS:-200}" --eval_it 100 --num_eval 3 \
                    --epoch_eval_train 300 --memory_budget 8GiB --save_seconds 20
            fi
        done
        ;;
    *) fail "stage $stage: expected 1 to 6" ;;
esac
exit $failed
