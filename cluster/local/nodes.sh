#!/bin/bash
# Several Ray nodes on this machine, to try a cluster before there is one: a head without CPUs and some workers, with ports
# and a token of their own, beside any other Ray of this machine.
#   bash cluster/local/nodes.sh                                       # until Ctrl-C; prints what another shell needs
#   bash cluster/local/nodes.sh r3hf ppo jobs/toy_ppo.toml --resume   # for as long as the command runs
#   WORKERS=3 CPUS=1 PORT=21000 bash cluster/local/nodes.sh ...       # defaults: 2 workers of 2 CPUs, ports from 20100
# It stops the processes it started by their ids, in whatever way it ends.
set -euo pipefail

workers=${WORKERS:-2} cpus=${CPUS:-2} port=${PORT:-20100}
folder=$(mktemp -d /tmp/r3hf-XXXXXX) # short: Unix sockets lie in it, whose paths end at 107 bytes
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token RAY_ADDRESS=127.0.0.1:$port
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$((port + 1))
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH")

nodes=()
finish() {
    trap '' INT TERM
    [ ${#nodes[@]} -eq 0 ] || { kill -TERM "${nodes[@]}" 2>/dev/null || true; wait "${nodes[@]}" 2>/dev/null || true; }
    rm -rf "$folder"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Each node has 100 ports of its own: its own services first, then those of its worker processes.
start() { # start BASE OPTION...
    local base=$1
    RAY_ADDRESS='' ray start --block --disable-usage-stats --node-ip-address=127.0.0.1 \
        --node-manager-port=$((base + 2)) --object-manager-port=$((base + 3)) --metrics-export-port=$((base + 4)) \
        --dashboard-agent-listen-port=$((base + 5)) --dashboard-agent-grpc-port=$((base + 6)) \
        --runtime-env-agent-port=$((base + 7)) --min-worker-port=$((base + 20)) --max-worker-port=$((base + 99)) \
        "${@:2}" >"$folder/node-$base.log" 2>&1 &
    nodes+=("$!")
}

start "$port" --head --port="$port" --num-cpus=0 --num-gpus=0 --temp-dir="$folder/ray" \
    --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 8))
for _ in $(seq 120); do
    ray health-check --address "$RAY_ADDRESS" 2>/dev/null && break
    kill -0 "${nodes[0]}" 2>/dev/null || { cat "$folder"/node-*.log >&2; exit 1; }
    sleep 0.5
done
# 0 once so many nodes have joined; 3 if the last one's process ends before: Ray gives a node 30 s, which a busy machine
# may not have.
joined() { # joined WANTED PID
    python - "$1" "$2" <<'EOF'
import os, sys, time
import ray
wanted, pid, until = int(sys.argv[1]), int(sys.argv[2]), time.monotonic() + 120
ray.init(log_to_driver=False, logging_level="ERROR")
while (there := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if not os.path.exists(f"/proc/{pid}"):
        sys.exit(3)
    if time.monotonic() > until:
        sys.exit(f"nodes.sh: only {there} of {wanted} nodes have joined")
    time.sleep(0.2)
EOF
}
for number in $(seq "$workers"); do
    for try in 1 2 3; do
        start $((port + 100 * number)) --address="$RAY_ADDRESS" --num-cpus="$cpus"
        state=0
        joined $((number + 1)) "${nodes[-1]}" || state=$?
        [ "$state" -eq 3 ] && [ "$try" -lt 3 ] || break
        unset 'nodes[-1]'
    done
    [ "$state" -eq 0 ] || { tail -n 5 "$folder"/node-*.log >&2; exit 1; }
done

if [ $# -gt 0 ]; then
    "$@"
    exit
fi
echo "$workers workers of $cpus CPUs; dashboard: $RAY_API_SERVER_ADDRESS; Ctrl-C ends them. In another shell:"
for name in RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH RAY_ADDRESS RAY_API_SERVER_ADDRESS; do
    echo "export $name=${!name}"
done
wait -n "${nodes[@]}"
echo "nodes.sh: a node has ended" >&2
exit 1
