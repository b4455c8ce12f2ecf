#!/usr/bin/env bash
# Install packages into an environment: by uv where it is on the PATH (seconds), else by pip.
#   install.sh PYTHON [arguments of `pip install`]
# uv has index settings of its own (UV_DEFAULT_INDEX, uv.toml) and does not read pip's: where it finds no package, pip tries.
set -eu
python=$1
shift
if command -v uv >/dev/null; then
  uv pip install --quiet --python "$python" "$@" && exit
  echo "uv could not install that; pip tries" >&2
fi
# As with uv, Python compiles what it imports, not pip all that is there.
exec "$python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
