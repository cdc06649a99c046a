"""Asks a server with KServe's own client, in an environment of its own: what comes out of it, as .npz.

python tests/support/kserve_asks.py ADDRESS MODEL BINARY FEEDS.npz OUTPUTS.npz [FEEDS.npz OUTPUTS.npz ...]
"""

from __future__ import annotations

import asyncio
import sys

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.utils.numpy_codec import from_np_dtype


async def main(address: str, model: str, kind: str, *files: str) -> None:
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    if not (await client.is_server_live(address) and await client.is_server_ready(address)):
        raise SystemExit("the server is not ready")
    if not await client.is_model_ready(address, model):
        raise SystemExit("the model is not ready")
    for feeds, outputs in zip(files[::2], files[1::2], strict=True):
        await ask(client, address, model, kind == "binary", feeds, outputs)
    await client.close()


async def ask(client: InferenceRESTClient, address: str, model: str, binary: bool, feeds: str, outputs: str) -> None:
    arrays = np.load(feeds)
    inputs = []
    for name in arrays.files:
        made = InferInput(name, list(arrays[name].shape), from_np_dtype(arrays[name].dtype))
        # As JSON it does not send what JSON has no numbers for.
        made.set_data_from_numpy(arrays[name], binary_data=binary or arrays[name].dtype == np.float16)
        inputs.append(made)
    parameters = {"binary_data_output": True} if binary else None
    answer = await client.infer(address, InferRequest(model, inputs, parameters=parameters), model_name=model)
    np.savez(outputs, **{output.name: output.as_numpy() for output in answer.outputs})


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
