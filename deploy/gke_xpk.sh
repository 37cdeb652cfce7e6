#!/usr/bin/env bash
# Training on TPU slices in GKE with xpk (pip install xpk), which writes and submits a JobSet:  deploy/gke_xpk.sh
#
# Once before: the cluster, the image, and the data in a bucket, on which the service account of the nodes needs
# roles/storage.objectAdmin (with Workload Identity: the Kubernetes service account of the pods):
#   xpk cluster create --cluster=$CLUSTER --project=$PROJECT --zone=$ZONE --tpu-type=$TPU --num-slices=$SLICES
#   docker build -f deploy/Dockerfile -t $IMAGE . && docker push $IMAGE
#   nextllm prepare --config configs/llama3_1b.py --output gs://$BUCKET/data
set -euo pipefail

# Change these.
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-west4-a}
CLUSTER=${CLUSTER:-my-cluster}
WORKLOAD=${WORKLOAD:-nextllm}
TPU=${TPU:-v5litepod-16}
SLICES=${SLICES:-2}
IMAGE=${IMAGE:-us-docker.pkg.dev/my-project/my-repository/nextllm:1}
BUCKET=${BUCKET:-my-bucket} # without gs://

# 75 means interrupted and saved, run again; 1 is what the others end with when one machine is lost. With them in the
# list the JobSet starts all pods again, and the run continues.
# exec: SIGTERM must reach python, not a shell that waits for it; the grace period is the time to save. Spot nodes end
# about 30 s after SIGTERM: add --training.preemption-seconds 25.
xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$WORKLOAD" \
    --tpu-type="$TPU" --num-slices="$SLICES" --docker-image="$IMAGE" \
    --max-restarts=50 --restart-on-exit-codes=1,75 --termination-grace-period-seconds=300 \
    --command="exec python train.py --config configs/llama3_1b.py --platform tpu --workdir \
gs://$BUCKET/runs/$WORKLOAD --data.path gs://$BUCKET/data --training.accumulation-steps 8 \
--mesh.slices $SLICES --mesh.data $SLICES --mesh.fsdp -1"
