#!/usr/bin/env bash
# Training on Cloud TPU VMs, one slice or several, with gcloud alone.
#
#   deploy/tpu_vm.sh create    # ask for the TPUs; they are there when `deploy/tpu_vm.sh state` says ACTIVE
#   deploy/tpu_vm.sh setup     # on every worker: shared storage, this repository, Python and its packages
#   deploy/tpu_vm.sh train     # on every worker: train in the background; the same again continues
#   deploy/tpu_vm.sh log       # what process 0 says
#   deploy/tpu_vm.sh stop      # save and stop
#   deploy/tpu_vm.sh delete    # give the TPUs back
#
# The workers find each other by the TPU's metadata: no --distributed flags. All must see the same run directory and
# data, so that a Filestore share (or another NFS) is mounted on each; a bucket mounted as a directory will not do,
# since runs rely on atomic renames and locks.
set -euo pipefail

# Change these.
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-west4-a}
NAME=${NAME:-nextllm}
ACCELERATOR=${ACCELERATOR:-v5litepod-16}      # of one slice: gcloud compute tpus accelerator-types list --zone=$ZONE
SOFTWARE=${SOFTWARE:-v2-alpha-tpuv5-lite}     # gcloud compute tpus versions list --zone=$ZONE
SLICES=${SLICES:-1}                           # several are joined by the data-center network
REPOSITORY=${REPOSITORY:-https://github.com/me/nextllm_jax.git}
SHARE=${SHARE:-10.0.0.2:/share}               # address and name of the Filestore share, in the TPUs' network
CONFIG=${CONFIG:-configs/llama3_8b.py}

WHERE=(--project="$PROJECT" --zone="$ZONE")

# Run a command on workers: first the number of the slice, then that of the worker in it, or all; then the command.
on() {
    if [ "$SLICES" -eq 1 ]; then
        gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker="$2" --command="$3"
    else
        gcloud compute tpus queued-resources ssh "$NAME" "${WHERE[@]}" --node="$1" --worker="$2" --command="$3"
    fi
}

case ${1:-} in
create)
    nodes=(--node-id="$NAME")
    if [ "$SLICES" -gt 1 ]; then nodes=(--node-count="$SLICES" --node-prefix="$NAME"); fi
    # --spot is cheaper, and can be taken away at any moment; then: delete, create, setup, train.
    gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" "${nodes[@]}" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$SOFTWARE" --spot
    ;;
state)
    gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format="value(state.state)"
    ;;
setup)
    on all all "
        set -e
        sudo apt-get install -y nfs-common
        sudo mkdir -p /share
        mountpoint -q /share || sudo mount $SHARE /share
        sudo chmod 777 /share
        [ -d nextllm ] || git clone $REPOSITORY nextllm
        cd nextllm
        curl -LsSf https://astral.sh/uv/install.sh | sh
        ~/.local/bin/uv venv --python 3.12 --allow-existing
        ~/.local/bin/uv pip install -e '.[tpu,hf]'"
    ;;
train)
    # Exit code 75 means interrupted and saved, run again. All processes end with the same code, so that each worker
    # can start its own anew; they wait for each other.
    on all all "
        cd nextllm
        rm -f stop
        cat > train.sh <<'SCRIPT'
            . .venv/bin/activate
            export JAX_COMPILATION_CACHE_DIR=/share/compiled
            code=75
            while [ \$code = 75 ] && [ ! -e stop ]; do
                python train.py --config $CONFIG --platform tpu --workdir /share/runs/$NAME --data.path /share/data \\
                    --mesh.slices $SLICES --mesh.data $SLICES --mesh.fsdp -1
                code=\$?
            done
            exit \$code
SCRIPT
        nohup bash train.sh > train.log 2>&1 < /dev/null &"
    ;;
log)
    on 0 0 "tail -n 50 -f nextllm/train.log"
    ;;
stop)
    on all all "touch nextllm/stop; pkill -TERM -f '[p]ython train.py'"
    ;;
delete)
    gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force
    ;;
*)
    sed -n '2,14p' "$0"
    exit 2
    ;;
esac
