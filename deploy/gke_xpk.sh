#!/usr/bin/env bash
# Training on TPU slices in GKE with xpk (pip install xpk), which writes and submits a JobSet:  deploy/gke_xpk.sh
#
# Once before: the cluster, the image, and storage that all pods can write, mounted at /share (not a bucket: runs rely
# on atomic renames and locks):
#   xpk cluster create --cluster=$CLUSTER --project=$PROJECT --zone=$ZONE --tpu-type=$TPU --num-slices=$SLICES
#   docker build -f deploy/Dockerfile -t $IMAGE . && docker push $IMAGE
#   xpk storage create nextllm-share --cluster=$CLUSTER --project=$PROJECT --zone=$ZONE --type=gcpfilestore \
#       --access-mode=ReadWriteMany --vol=share --size=1024 --tier=BASIC_HDD --mount-point=/share --auto-mount=true \
#       --readonly=false
set -euo pipefail

# Change these.
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-west4-a}
CLUSTER=${CLUSTER:-my-cluster}
WORKLOAD=${WORKLOAD:-nextllm}
TPU=${TPU:-v5litepod-16}
SLICES=${SLICES:-2}
IMAGE=${IMAGE:-us-docker.pkg.dev/my-project/my-repository/nextllm:1}

# 75 means interrupted and saved, run again; 1 is what the others end with when one machine is lost. With them in the
# list the JobSet starts all pods again, and the run continues.
# exec: SIGTERM must reach python, not a shell that waits for it; the grace period is the time to save.
xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$WORKLOAD" \
    --tpu-type="$TPU" --num-slices="$SLICES" --docker-image="$IMAGE" \
    --max-restarts=50 --restart-on-exit-codes=1,75 --termination-grace-period-seconds=300 \
    --env=JAX_COMPILATION_CACHE_DIR=/share/compiled \
    --command="exec python train.py --config configs/llama3_8b.py --platform tpu --workdir /share/runs/$WORKLOAD \
--data.path /share/data --mesh.slices $SLICES --mesh.data $SLICES --mesh.fsdp -1"
