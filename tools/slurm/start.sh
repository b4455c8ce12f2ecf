#!/usr/bin/env bash
# Start a real, private Slurm on this one host: munged, slurmctld and a few slurmd, without systemd.
#   tools/slurm/start.sh [STATE]      then   . STATE/env      and, at the end, tools/slurm/stop.sh [STATE]
#
# Everything lives in STATE (default /tmp/laid-slurm-<uid>). As root, /etc/slurm/{slurm,gres}.conf become links into
# it; as another user, STATE/env sets SLURM_CONF and wraps srun, because Snakemake's job step drops SLURM_CONF.
# Needs: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
# Settings: SLURM_NODES=2, and per node SLURM_CPUS=2 SLURM_MEM_MB=7000 SLURM_GPUS=0 (claimed, not checked: a GPU is a
# stand-in device that Slurm really allocates), SLURM_NODE_TIMEOUT=30 s until a silent node is down,
# SLURM_PORT=16817, SLURM_ACCOUNTING=1 for slurmdbd on a private MariaDB (then also needs: slurmdbd
# slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STATE=$(realpath -m "${1:-/tmp/laid-slurm-$(id -u)}")
NODES=${SLURM_NODES:-2} CPUS=${SLURM_CPUS:-2} MEM=${SLURM_MEM_MB:-7000} GPUS=${SLURM_GPUS:-0}
PORT=${SLURM_PORT:-16817} TIMEOUT=${SLURM_NODE_TIMEOUT:-30} ACCOUNTING=${SLURM_ACCOUNTING:-0}
HOST=$(hostname -s) ME=$(id -un)
PATH=$PATH:/usr/sbin:/sbin

need() { # need PACKAGES COMMAND...
  local packages=$1 command; shift
  for command in "$@"; do
    command -v "$command" >/dev/null && continue
    echo "no $command here: apt-get install -y --no-install-recommends $packages" >&2
    exit 2
  done
}
wait_for() { # wait_for SECONDS COMMAND...
  local tries=$(($1 * 5)); shift
  for ((i = 0; i < tries; i++)); do "$@" >/dev/null 2>&1 && return 0; sleep 0.2; done
  return 1
}

need "slurmctld slurmd slurm-client munge" munged slurmctld slurmd sinfo
if [ "$ACCOUNTING" = 1 ]; then
  need "slurmdbd slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core" mariadbd mariadb-install-db slurmdbd
fi
if [ -s "$STATE/munged.pid" ] && kill -0 "$(cat "$STATE/munged.pid")" 2>/dev/null; then
  echo "a cluster is already running in $STATE" >&2
  exit 1
elif [ -e "$STATE/.laid-slurm" ]; then
  rm -rf "$STATE" # every start is a fresh cluster
elif [ -n "$(ls -A "$STATE" 2>/dev/null)" ]; then
  echo "$STATE is not empty and was not made by this script: name another folder" >&2
  exit 1
fi
mkdir -p "$STATE"/{munge,sock,state,log,dev,bin,spool}
touch "$STATE/.laid-slurm"
chmod 755 "$STATE" "$STATE/sock"
chmod 700 "$STATE/munge"
for ((n = 1; n <= NODES; n++)); do mkdir -p "$STATE/spool/node$n"; done

# ---- munge, with a key and a socket of its own
(umask 077; head -c 1024 /dev/urandom >"$STATE/munge/munge.key")
munged --key-file="$STATE/munge/munge.key" --socket="$STATE/sock/munge.sock" --pid-file="$STATE/munged.pid" \
  --log-file="$STATE/munge/munged.log" --seed-file="$STATE/munge/munged.seed" --num-threads=2

# ---- configuration
sed -e "s|@STATE@|$STATE|g; s|@HOST@|$HOST|g; s|@USER@|$ME|g; s|@NODES@|$NODES|g; s|@CPUS@|$CPUS|g" \
  -e "s|@MEM@|$MEM|g; s|@GPUS@|$GPUS|g; s|@PORT@|$PORT|g; s|@TIMEOUT@|$TIMEOUT|g" \
  -e "s|@FIRST@|$((PORT + 1))|g; s|@LAST@|$((PORT + NODES))|g" "$here/slurm.conf.in" >"$STATE/slurm.conf"
: >"$STATE/gres.conf"
for ((g = 0; g < GPUS; g++)); do
  ln -sfn /dev/null "$STATE/dev/gpu$g"
  echo "Name=gpu File=$STATE/dev/gpu$g" >>"$STATE/gres.conf"
done
[ "$GPUS" -gt 0 ] || sed -i -e '/^GresTypes/d' -e 's/ Gres=gpu:[0-9]*//' "$STATE/slurm.conf"
# From 23.11 on Slurm looks for cgroups even where no plugin uses them; older versions do not know this setting.
version=$(slurmd -V | sed -E 's/[^0-9]*([0-9]+)\.([0-9]+).*/\1\2/')
[ "$version" -lt 2311 ] || echo CgroupPlugin=disabled >"$STATE/cgroup.conf"
echo "export SLURM_CONF=$STATE/slurm.conf" >"$STATE/env"
export SLURM_CONF="$STATE/slurm.conf"
if [ "$(id -u)" = 0 ]; then
  mkdir -p /etc/slurm
  for file in slurm gres; do
    if [ -e /etc/slurm/$file.conf ] && [ ! -L /etc/slurm/$file.conf ]; then
      echo "/etc/slurm/$file.conf is a real file, this host has a Slurm of its own: nothing started" >&2
      kill "$(cat "$STATE/munged.pid")"
      exit 1
    fi
    ln -sfn "$STATE/$file.conf" /etc/slurm/$file.conf
  done
else
  printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$STATE/slurm.conf" "$(command -v srun)" >"$STATE/bin/srun"
  chmod +x "$STATE/bin/srun"
  echo "export PATH=$STATE/bin:\$PATH" >>"$STATE/env"
fi

# ---- accounting
if [ "$ACCOUNTING" = 1 ]; then
  dbport=$((PORT + 101)) dbdport=$((PORT + 100)) sql="mariadb --no-defaults -uroot -S $STATE/sock/db.sock"
  mkdir -p "$STATE/db"
  sed -i -e "s|^AccountingStorageType=.*|AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\nAccountingStoragePort=$dbdport\nAccountingStoragePass=$STATE/sock/munge.sock\nAccountingStoreFlags=job_comment|" \
    -e "s|^JobAcctGatherType=.*|JobAcctGatherType=jobacct_gather/linux\nJobAcctGatherFrequency=5|" "$STATE/slurm.conf"
  mariadb-install-db --no-defaults --datadir="$STATE/db" --user="$ME" --auth-root-authentication-method=normal \
    --skip-test-db >"$STATE/log/db-install.log" 2>&1
  mariadbd --no-defaults --datadir="$STATE/db" --user="$ME" --port=$dbport --bind-address=127.0.0.1 \
    --socket="$STATE/sock/db.sock" --pid-file="$STATE/mariadbd.pid" --innodb-buffer-pool-size=64M \
    >"$STATE/log/mariadbd.log" 2>&1 &
  wait_for 20 $sql -e 'select 1'
  $sql -e "create database slurm_acct_db; create user slurm@'127.0.0.1' identified by 'slurm';
    create user slurm@localhost identified by 'slurm'; grant all on slurm_acct_db.* to slurm@'127.0.0.1', slurm@localhost;"
  (umask 077; printf '%s\n' AuthType=auth/munge "AuthInfo=socket=$STATE/sock/munge.sock" DbdHost=localhost \
    "DbdPort=$dbdport" "SlurmUser=$ME" StorageType=accounting_storage/mysql StorageHost=127.0.0.1 \
    "StoragePort=$dbport" StorageUser=slurm StoragePass=slurm StorageLoc=slurm_acct_db \
    "PidFile=$STATE/slurmdbd.pid" "LogFile=$STATE/log/slurmdbd.log" >"$STATE/slurmdbd.conf")
  slurmdbd
  wait_for 20 sacctmgr -n list cluster
  sacctmgr -i add cluster laidtest >/dev/null
  sacctmgr -i add account lab Description=lab Organization=lab >/dev/null
  sacctmgr -i add user "$ME" Account=lab >/dev/null
fi

# ---- the daemons
slurmctld -c
for ((n = 1; n <= NODES; n++)); do slurmd -N "node$n"; done
all_idle() { [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" -eq "$NODES" ]; }
if wait_for 30 all_idle; then
  sinfo -N -l
  exit 0
fi
echo "the cluster did not come up; its logs are in $STATE/log" >&2
tail -n 20 "$STATE"/log/*.log >&2 || true
exit 1
