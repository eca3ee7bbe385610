# What a shell on a node needs before it calls Ray: `. ~/raylm/cluster/node.sh` in the commands of a cluster file.

export PATH="$HOME/raylm/.venv/bin:$PATH"
# The cluster takes nobody without its token; `raylm cluster up` makes the file, and the cluster file sends it.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray/auth_token"
export RAY_USAGE_STATS_ENABLED=0
# Ray recommends 65,536 open files; a limit that may not be raised stays.
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
ulimit -c 0
# Where ssh reached this machine, which is how the cluster file names it; the other nodes reach it there as well.
RAYLM_NODE_ADDRESS=${SSH_CONNECTION:+$(echo "$SSH_CONNECTION" | cut -d' ' -f3)}
RAYLM_NODE_ADDRESS=${RAYLM_NODE_ADDRESS:-$(hostname -I | cut -d' ' -f1)}
# The ports that a firewall between the nodes has to let through beside 6379, 8265 and those of Ray's workers (10002 to
# 19999). Training itself connects at ports that the system gives (/proc/sys/net/ipv4/ip_local_port_range).
RAYLM_NODE_PORTS="--node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382 \
--dashboard-agent-grpc-port=6383 --dashboard-agent-listen-port=52365 --metrics-export-port=6384"
