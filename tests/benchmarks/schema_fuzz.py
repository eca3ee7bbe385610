"""Requests made up from the OpenAPI document (schemathesis) against `raylm serve`, and what they were answered.

    python -m venv VENV && VENV/bin/pip install schemathesis openapi-spec-validator    # not part of the pinned set
    python tests/benchmarks/schema_fuzz.py MODEL_DIRECTORY OUT.json --venv VENV --seconds 600

Says whether the document is valid, what schemathesis found, and how many answers each route gave with each status, by
the server's own count. A small model gets through more requests.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from serving_load import HttpArm, free_port, serve_command

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
_COUNT = re.compile(r'raylm_http_requests_total\{route="([^"]+)",status="(\d+)"\} (\d+)')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--collection", help="made by `raylm prepare`, for /v1/qa")
    arguments = parser.parse_args()
    port = free_port()
    serving = {"max_new_tokens": 32}
    if arguments.collection:
        serving["collection"] = arguments.collection
    with tempfile.TemporaryDirectory() as directory:
        server = HttpArm(
            "raylm", serve_command(arguments.model, 1, port, Path(directory), **serving), port, "/health", "model",
            chat=False, pausable=False,
        )  # fmt: skip
        try:
            document = Path(directory) / "openapi.json"
            urllib.request.urlretrieve(f"http://127.0.0.1:{port}/openapi.json", document)
            binaries = arguments.venv / "bin"
            valid = subprocess.run([binaries / "openapi-spec-validator", document], capture_output=True, text=True)
            command = [binaries / "st", "run", document, "--url", f"http://127.0.0.1:{port}", "--checks", CHECKS]
            command += ["--max-time", str(arguments.seconds), "--continue-on-failure", "--request-timeout", "60"]
            fuzz = subprocess.run(command, capture_output=True, text=True, cwd=directory)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
                counts = {
                    f"{route} {status}": int(count) for route, status, count in _COUNT.findall(response.read().decode())
                }
        finally:
            server.stop()
    result = {
        "document_valid": valid.returncode == 0,
        "validator": valid.stdout + valid.stderr,
        "requests": sum(counts.values()),
        "answers": counts,
        "status_500": sum(count for name, count in counts.items() if name.endswith(" 500")),
        "schemathesis": fuzz.stdout,
        "schemathesis_errors": fuzz.stderr,
    }
    arguments.output.write_text(json.dumps(result, indent=1))
    sys.stdout.write(fuzz.stdout[-6000:])
    print(json.dumps({key: value for key, value in result.items() if "schemathesis" not in key}, indent=1))


if __name__ == "__main__":
    main()
