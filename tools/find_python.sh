#!/usr/bin/env bash
# Print the path of a Python 3.11 or 3.12 that can make virtual environments; say what is missing otherwise.
#   find_python.sh [CANDIDATE]     with CANDIDATE, only that one is tried
set -u
tried=()
if [ -n "${1:-}" ]; then candidates=("$1"); else candidates=(python3.12 python3.11 python3 python); fi
for name in "${candidates[@]}"; do
  while IFS= read -r path; do
    # Not that of the environment which is about to be made again.
    case $path in "$PWD"/.venv/*) continue ;; esac
    # A name on the PATH may be a launcher for a version that is not installed: only running it tells.
    found=$("$path" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    case $found in
      3.11 | 3.12) ;;
      *) tried+=("$path is $found"); continue ;;
    esac
    if ! "$path" -c 'import ensurepip, venv' 2>/dev/null; then
      tried+=("$path is $found but lacks venv (Debian and Ubuntu: apt-get install python$found-venv)")
      continue
    fi
    echo "$path"
    exit 0
  done < <(type -ap "$name" | awk '!seen[$0]++')
done
{
  echo "laid needs Python 3.11 or 3.12 with venv, and found none."
  [ ${#tried[@]} = 0 ] || printf '  %s\n' "${tried[@]}"
  echo "Install one (e.g. apt-get install python3.11-venv, brew install python@3.12), or name it: make demo PYTHON=/path/to/python3.12"
} >&2
exit 1
