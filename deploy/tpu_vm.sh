#!/usr/bin/env bash
# Training on Cloud TPU VMs, one slice or several, with gcloud and a bucket alone.
#
#   deploy/tpu_vm.sh watch     # create, setup and train; again on new machines when a spot slice is lost; until it ends
#
# or step by step:
#
#   deploy/tpu_vm.sh create    # ask for the TPUs; they are there when `deploy/tpu_vm.sh state` says ACTIVE
#   deploy/tpu_vm.sh setup     # on every worker: this repository at the commit of `create`, Python and its packages
#   deploy/tpu_vm.sh train     # on every worker: train in the background; the same again continues
#   deploy/tpu_vm.sh log       # what process 0 says
#   deploy/tpu_vm.sh stop      # save and stop
#   deploy/tpu_vm.sh delete    # give the TPUs back
#
# The run and its data are in the bucket, the best place for which is the region of the zone. The service account of the
# TPU VMs needs roles/storage.objectAdmin on it; so do you, since the commit is kept there. Once before, anywhere:
#   nextllm prepare --config configs/llama3_1b.py --output gs://BUCKET/data
# docs/multi_host.md has all commands from an empty project on.
# The workers find each other by the TPU's metadata: no --distributed flags.
set -euo pipefail

# Change these.
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-west4-a}
NAME=${NAME:-nextllm}
ACCELERATOR=${ACCELERATOR:-v5litepod-16}      # of one slice: gcloud compute tpus accelerator-types list --zone=$ZONE
SOFTWARE=${SOFTWARE:-v2-alpha-tpuv5-lite}     # gcloud compute tpus versions list --zone=$ZONE
SLICES=${SLICES:-1}                           # several are joined by the data-center network
REPOSITORY=${REPOSITORY:-https://github.com/me/nextllm_jax.git}
BUCKET=${BUCKET:-my-bucket}                   # without gs://
CONFIG=${CONFIG:-configs/llama3_1b.py}
OPTIONS=${OPTIONS:---training.accumulation-steps 8} # further ones of train.py: what `nextllm plan` says fits the chips
DATA=${DATA:-gs://$BUCKET/data}
FAILURES=${FAILURES:-3}                       # `watch` tries that often again what failed on a slice
POLL_SECONDS=${POLL_SECONDS:-60}              # of `watch`

WHERE=(--project="$PROJECT" --zone="$ZONE")
PIN=gs://$BUCKET/runs/$NAME.commit            # the commit that every machine of this run trains

# Run a command on workers: first the number of the slice, then that of the worker in it, or all; then the command.
on() {
    if [ "$SLICES" -eq 1 ]; then
        gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker="$2" --command="$3"
    else
        gcloud compute tpus queued-resources ssh "$NAME" "${WHERE[@]}" --node="$1" --worker="$2" --command="$3"
    fi
}

# State the commit to train: COMMIT, or the one that is checked out here. It must have been pushed to REPOSITORY.
pin() {
    local commit
    commit=${COMMIT:-$(git rev-parse HEAD)} || return
    echo "$commit" | gcloud storage cp - "$PIN"
}

request() {
    local nodes=(--node-id="$NAME")
    if [ "$SLICES" -gt 1 ]; then nodes=(--node-count="$SLICES" --node-prefix="$NAME"); fi
    # --spot is cheaper, and can be taken away at any moment, which `watch` handles.
    gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" "${nodes[@]}" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$SOFTWARE" --spot
}

# WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED (a spot slice was lost), FAILED, ...; MISSING without a request.
state() {
    local request nodes
    request=$(gcloud compute tpus queued-resources list "${WHERE[@]}" --filter="name~/$NAME\$" \
        --format="value(state.state)") || return
    if [ "$request" = ACTIVE ]; then # a request can stay ACTIVE for a while after its nodes are gone
        nodes=$(gcloud compute tpus tpu-vm list "${WHERE[@]}" --filter="name~/$NAME(-[0-9]+)?\$" \
            --format="value(state)") || return
        case $nodes in *PREEMPTED* | *TERMINATED*) request=SUSPENDED ;; esac
    fi
    echo "${request:-MISSING}"
}

release() {
    gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
}

setup() {
    local commit
    commit=$(gcloud storage cat "$PIN") || return
    on all all "
        set -e
        [ -d nextllm ] || git clone $REPOSITORY nextllm
        cd nextllm
        git fetch origin
        git checkout --force --detach $commit
        curl -LsSf https://astral.sh/uv/install.sh | sh
        ~/.local/bin/uv venv --python 3.12 --allow-existing
        ~/.local/bin/uv pip install -e '.[tpu,gcs,hf]'
        touch ready"
}

train() {
    # Exit code 75 means interrupted and saved, run again. All processes end with the same code, so that each worker
    # can start its own anew; they wait for each other. A spot machine is given about 30 s after SIGTERM.
    on all all "
        cd nextllm
        rm -f stop code
        cat > train.sh <<'SCRIPT'
            . .venv/bin/activate
            code=75
            while [ \$code = 75 ] && [ ! -e stop ]; do
                python train.py --config $CONFIG --platform tpu --workdir gs://$BUCKET/runs/$NAME \\
                    --data.path $DATA --training.preemption-seconds 25 $OPTIONS \\
                    --mesh.slices $SLICES --mesh.data $SLICES --mesh.fsdp -1
                code=\$?
            done
            echo \$code > code
SCRIPT
        nohup bash train.sh > train.log 2>&1 < /dev/null &"
}

# What worker 0 does: new (not set up), training, lost (it was restarted), or the exit code of the training.
progress() {
    on 0 0 "
        cd nextllm 2> /dev/null && [ -e ready ] || { echo new; exit; }
        # The code is read last: it is written at the end of the training.
        if pgrep -f '[b]ash train.sh' > /dev/null; then echo training; elif [ -e code ]; then cat code; else echo lost; fi"
}

# Keep a training running until it has ended, on as many slices as it takes. The exit code is that of the training.
watch() {
    local failures=0 unknown=0 now
    while true; do
        if now=$(state); then
            unknown=0
        else
            now=UNKNOWN unknown=$((unknown + 1))
            [ "$unknown" -lt 10 ] || { echo "gcloud has failed 10 times in a row" >&2; exit 1; }
        fi
        [ "$now" != ACTIVE ] || now=$(progress) || now=UNREACHABLE
        case $now in
        MISSING)
            # A slice that replaces another one trains the same commit.
            gcloud storage cat "$PIN" > /dev/null 2>&1 || pin || failed "the commit could not be stored in $PIN"
            request || failed "no slice could be requested"
            ;;
        SUSPENDED)
            echo "the slice was lost: asking for a new one" >&2
            failures=0
            release || true
            ;;
        FAILED)
            failed "the request for a slice failed"
            release || true
            ;;
        new) { setup && train; } || failed "the slice could not be set up" ;;
        lost) train || true ;;
        0 | 2 | 75) # 75: deploy/tpu_vm.sh stop
            echo "the training has ended with exit code $now; $0 delete gives the TPUs back" >&2
            exit "$now"
            ;;
        [0-9]*)
            failed "the training ended with exit code $now" "$now"
            train || true
            ;;
        esac
        sleep "$POLL_SECONDS"
    done
}

# Count a failure, and end the watch after too many.
failed() {
    failures=$((failures + 1))
    echo "$1 ($failures)" >&2
    [ "$failures" -le "$FAILURES" ] || exit "${2:-1}"
}

case ${1:-} in
create)
    pin
    request
    ;;
state | setup | train | watch)
    "$1"
    ;;
log)
    on 0 0 "tail -n 50 -f nextllm/train.log"
    ;;
stop)
    on all all "touch nextllm/stop; pkill -TERM -f '[p]ython train.py'"
    ;;
delete)
    release
    gcloud storage rm "$PIN"
    ;;
*)
    sed -n '2,18p' "$0"
    exit 2
    ;;
esac
