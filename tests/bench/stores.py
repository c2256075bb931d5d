"""A bucket of small objects, in the store that S3_TEST_ENDPOINT and its like name, or in moto's server."""

from __future__ import annotations

import io
import os
import tarfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import boto3
import numpy as np

from tests.servers import REAL_STORE, moto_server, real_store


@contextmanager
def filled(n: int, size: int = 2400) -> Iterator[tuple[str, str]]:
    """A data set of `n` objects of `size` bytes, and the same as an archive: their URIs, with the environment set.

    No image is decoded: the objects are noise, which no store compresses.
    """
    with ExitStack() as stack:
        variables = real_store(REAL_STORE)
        if variables is None:
            endpoint = stack.enter_context(moto_server())
            keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
            variables = {"AWS_ENDPOINT_URL": endpoint, **keys}
        os.environ.update({"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"} | variables)
        client = boto3.client("s3")
        bucket = f"bench-{uuid.uuid4().hex[:12]}"
        client.create_bucket(Bucket=bucket)
        rng = np.random.default_rng(0)
        bodies = {f"train/image-{i}.png": rng.bytes(size) for i in range(n)}
        bodies["answers.json"] = b"{}"
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, body in bodies.items():
                member = tarfile.TarInfo(name)
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))
        objects = {f"data/{name}": body for name, body in bodies.items()} | {"data.tar": packed.getvalue()}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: client.put_object(Bucket=bucket, Key=key, Body=objects[key]), objects))
        yield f"s3://{bucket}/data", f"s3://{bucket}/data.tar"
