#!/bin/bash
# Rendered by `bigmodel launch tpu-vm`. Runs the same command on every worker of a TPU VM (or of each
# slice of a queued resource); jax finds the peers from the TPU's own metadata.
set -u
run() {
  gcloud compute tpus tpu-vm ssh {{tpu}} --project={{project}} --zone={{zone}} --worker=all --command="$1"
}

# Each worker keeps its own loop; the run directory is shared, so all reach the same verdict.
run '
cd {{directory}} || exit 2
{{exports}}
export BIGMODEL_COORDINATOR=auto
mkdir -p ~/bigmodel-logs
while :; do
  {{command}} --workdir {{workdir}} >> ~/bigmodel-logs/process.log 2>&1
  code=$?
  [ $code -eq 0 ] && exit 0
  mkdir -p ~/bigmodel-books
  {{python}} -m bigmodel_jax.launch.policy ~/bigmodel-books $code || exit $code
  sleep 10
done'
