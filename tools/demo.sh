#!/usr/bin/env bash
# demo.sh CORES: `make demo` once laid is installed. Goes on where a killed one stopped, and leaves others at work alone.
set -euo pipefail
mark=.snakemake/demo # there while a demo is at work; where one was killed, nobody holds it
mkdir -p .snakemake
killed=
[ ! -e "$mark" ] || killed=yes
exec 9>"$mark"
if ! command -v flock >/dev/null; then
  killed=
elif ! flock -n 9; then
  echo "make demo: error: another one is at work in this folder" >&2
  exit 1
fi
trap 'rm -f "$mark"' EXIT

here=$(pwd -P)
for process in /proc/[0-9]*; do # which are none where there is no /proc
  [ "$process/cwd" -ef . ] || continue
  if tr '\0' '\n' 2>/dev/null <"$process/cmdline" | grep -qE '(^|/)snakemake$'; then
    echo "make demo: error: Snakemake is at work in this folder (process ${process#/proc/}): wait for its end or stop it" >&2
    exit 1
  fi
done
if [ -n "$(ls -A .snakemake/locks 2>/dev/null)" ]; then
  if [ -z "$killed" ]; then
    echo "make demo: error: $here is locked by a Snakemake that was killed or runs on another machine: if none runs: snakemake --unlock" >&2
    exit 1
  fi
  snakemake --unlock --quiet all
fi
# Where Snakemake ends without taking its lock away, the mark stays: the next demo may then do it. Jobs that outlive it hold no mark.
trap '[ -n "$(ls -A .snakemake/locks 2>/dev/null)" ] || rm -f "$mark"' EXIT
snakemake --cores "$1" --rerun-incomplete 9>&-
laid tables
