"""schemathesis makes requests up, right ones and wrong ones, from the OpenAPI description: no answer may be a 5xx."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from serving import picture, running, small_service

EXAMPLES = int(os.environ.get("RECOLLECT_FUZZ", "10"))  # for each of seven endpoints and each phase
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method"
)


def test_no_made_up_request_is_answered_by_an_error_of_the_server(tmp_path: Path) -> None:
    """RECOLLECT_FUZZ=1800 makes more than 5,000 requests, and takes some ten minutes."""
    with running(small_service(folder=tmp_path / "memory")) as server:
        command = [
            *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"),
            *(f"{server.url}/openapi.json", "--checks", CHECKS, "--max-examples", str(EXAMPLES), "--seed", "1"),
            *("--phases", "coverage,fuzzing", "--no-color", "--generation-database", "none"),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3600, check=False)
        assert done.returncode == 0, done.stdout[-5000:]
        statuses = Counter[str]()
        for line in server.client.get("/metrics").text.splitlines():
            if line.startswith("recollect_requests_total"):
                statuses[line.partition('status="')[2][:3]] += int(float(line.rpartition(" ")[2]))
        print(f"{statuses.total()} requests: {dict(statuses)}")
        assert statuses.total() >= 3 * EXAMPLES
        assert statuses["200"] >= EXAMPLES
        assert not [status for status in statuses if status.startswith("5")]
        again = server.client.post("/v1/predict", json={"inputs": [picture(1)]})
        assert again.status_code == 200
