"""`mlflow-trt serve --tracing`, whose spans are written to a file, a line of JSON for each.

python tests/support/traced_server.py MODEL PORT SPANS FRONT_ENDS
"""

from __future__ import annotations

import sys

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from mlflow_trt.deploy.serve.server import ServeOptions, serve

if __name__ == "__main__":
    model, port, spans, front_ends = sys.argv[1:]
    provider = TracerProvider()
    with open(spans, "w") as file:  # noqa: PTH123  # a file to write to as long as the server runs
        exporter = ConsoleSpanExporter(out=file, formatter=lambda span: span.to_json(indent=None) + "\n")
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        settings = {"runtime": "onnxruntime"}
        options = ServeOptions(port=int(port), settings=settings, tracing=True, front_ends=int(front_ends))
        sys.exit(not serve([model], options, lambda _: None))
