"""Fuzz one target, or all of them one after the other: `python tests/tools/fuzz.py --seconds 60 [TARGET ...]`.

Each runs in a process of its own, and stops at the first input for which something else than a typed error is raised.
What is found becomes a test in tests/project/test_properties.py.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "tests/support", "tests/tools")]


def fuzz(name: str, arguments: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["mlflow_trt"]):
        from fuzz_targets import BY_BYTES
    atheris.Setup([sys.argv[0], *arguments], BY_BYTES[name])
    atheris.Fuzz()


def run_target(name: str, seconds: int, seeds: list[bytes]) -> tuple[int, str]:
    """How many inputs ran, and the output of the run where one failed."""
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        limits = [f"-max_total_time={seconds}", "-max_len=65536", "-rss_limit_mb=4096", "-timeout=300"]
        options = [*limits, "-print_final_stats=1", f"-artifact_prefix={tempfile.gettempdir()}/{name}-"]
        command = [sys.executable, __file__, "--one", name, *options, corpus]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    output = ended.stdout + ended.stderr
    counts = re.findall(r"(?:stat::number_of_executed_units:\s+|^#)(\d+)", output, re.MULTILINE)
    return int((counts or ["0"])[-1]), output if ended.returncode else ""


def main() -> int:
    from fuzz_targets import BY_BYTES, seeds

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(BY_BYTES))
    arguments = parser.parse_args()
    failed, total, begin_with = [], 0, seeds()
    for name in arguments.targets or BY_BYTES:
        count, output = run_target(name, arguments.seconds, begin_with.get(name, []))
        total += count
        print(f"{name}: {count:,} inputs{', the last of which fails:' if output else ''}", flush=True)
        if output:
            failed.append(name)
            print(output[-4000:], flush=True)
    print(f"{total:,} inputs in all; targets that fail: {', '.join(failed) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        fuzz(sys.argv[2], sys.argv[3:])
    sys.exit(main())
