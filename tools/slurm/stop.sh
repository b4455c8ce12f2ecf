#!/usr/bin/env bash
# Cancel all jobs of the cluster that start.sh started in STATE, then stop its daemons, each by its own pid file.
#   tools/slurm/stop.sh [STATE]
set -u
STATE=$(realpath -m "${1:-/tmp/laid-slurm-$(id -u)}")
export SLURM_CONF="$STATE/slurm.conf"
[ -e "$STATE/.laid-slurm" ] || { echo "$STATE was not made by start.sh" >&2; exit 1; }

if jobs=$(squeue -h -o %A 2>/dev/null) && [ -n "$jobs" ]; then
  # shellcheck disable=SC2086
  scancel $jobs
  for ((t = 0; t < 100; t++)); do
    [ -z "$(squeue -h 2>/dev/null)" ] && break
    sleep 0.2
  done
fi

stop() { # the processes of these pid files: TERM, wait, KILL
  local file pid pids=() alive=()
  for file in "$@"; do [ -s "$file" ] && pids+=("$(cat "$file")"); done
  [ ${#pids[@]} -gt 0 ] || return 0
  kill "${pids[@]}" 2>/dev/null
  for ((t = 0; t < 150; t++)); do
    alive=()
    for pid in "${pids[@]}"; do kill -0 "$pid" 2>/dev/null && alive+=("$pid"); done
    [ ${#alive[@]} = 0 ] && return 0
    sleep 0.1
  done
  echo "killing ${alive[*]}" >&2
  kill -9 "${alive[@]}" 2>/dev/null
}
stop "$STATE"/slurmd.*.pid
stop "$STATE/slurmctld.pid"
stop "$STATE/slurmdbd.pid"
stop "$STATE/mariadbd.pid"
stop "$STATE/munged.pid"
for file in slurm gres; do
  [ "$(readlink /etc/slurm/$file.conf 2>/dev/null)" = "$STATE/$file.conf" ] && rm -f "/etc/slurm/$file.conf"
done
exit 0
