"""What pyproject.toml cannot say: a wheel notes the commit it is built from, for `laid --version` and for provenance."""

import json
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TOP = Path(__file__).resolve().parent


def git(*words):
    done = subprocess.run(["git", "-C", TOP, *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()


class WithCommit(build_py):
    def run(self):
        super().run()
        # An editable installation lies in its checkout, which is asked; sources without one may lie in another's.
        if self.editable_mode or not (TOP / ".git").exists():
            return
        noted = {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
        Path(self.build_lib, "laid/built_from.json").write_text(json.dumps(noted) + "\n")


setup(cmdclass={"build_py": WithCommit})
