#!/bin/bash
# A TPU slice of Google Cloud: TPU=mine ZONE=us-east5-b BUCKET=mine bash examples/launch/tpu_vm.sh. The same command starts the
# run on every host of the slice; who they are comes from the TPU's metadata. Run it again and it resumes.
set -euo pipefail
: "${TPU:?the name of the TPU}" "${ZONE:?its zone}" "${BUCKET:?a bucket for data and runs}"

on_all() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

gcloud compute tpus tpu-vm scp --recurse --worker=all --zone="$ZONE" pyproject.toml README.md sftjax configs "$TPU":sftjax/
on_all "pip install -q './sftjax[tpu,gcs]'"
on_all "cd sftjax && ~/.local/bin/sftjax train \
    --config=configs/sft_lora.py \
    --config.data.train=gs://$BUCKET/mine.jsonl \
    --config.mesh.data=-1 \
    --config.mesh.fsdp=4 \
    --workdir=gs://$BUCKET/runs/mine"
