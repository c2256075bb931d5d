"""Places that cannot be written to, or reached."""

from __future__ import annotations

from tests.catalogue.archives import TAR, archived
from tests.catalogue.case import Case, both

PLACES = [
    Case("an output that is a file", 78, "answers.json", {"OUTPUT": "{data}/answers.json"}),
    Case("an output below a file", 78, "answers.json/out", {"OUTPUT": "{data}/answers.json/out"}),
    Case("an output that no file can be made in", 74, "/proc", {"OUTPUT": "/proc/none"}),
    Case("an output among the images", 78, "OUTPUT: must not be among the images", {"OUTPUT": "{data}/train/out"}),
    Case("an output that is a split", 78, "OUTPUT: must not be among the images", {"OUTPUT": "{data}/val"}),
    Case("an output among the images by a detour", 78, "OUTPUT: must not be among the images",
         {"OUTPUT": "{data}/../data/test/blue"}),
    Case("an output inside the input, beside the images", 0, "best epoch 1 of 1", {"OUTPUT": "{data}/out"}),
    Case("a working folder among the images", 78, "WORKDIR: must not be among the images", {"WORKDIR": "{data}/train"}),
    Case("a working folder that is a file", 78, "WORKDIR: must be a folder, a file is in its place",
         {"WORKDIR": "{data}/answers.json"}),
    Case("a working folder of another's", 78, "WORKDIR: must be a folder for this job alone",
         {"WORKDIR": "{tmp}/work", **TAR},
         both(archived("tar"), lambda data: (data.parent / "work/data").mkdir(parents=True))),
    Case("an output in a folder of the working folder's", 78, "OUTPUT: must not be in a folder of WORKDIR that jobs",
         {"WORKDIR": "{tmp}/work", "OUTPUT": "{tmp}/work/run"}),
    Case("an output in a folder of a node's working folder", 78, "OUTPUT: must not be in a folder of WORKDIR that jobs",
         {"WORKDIR": "{tmp}/work", "OUTPUT": "{tmp}/work/node-1/data/out"}),
    Case("charts in a folder of the working folder's", 78, "TENSORBOARD: must not be in a folder of WORKDIR that jobs",
         {"WORKDIR": "{tmp}/work", "TENSORBOARD": "{tmp}/other/../work/cache/charts"}),
    Case("an output that is the working folder", 0, "best epoch 1 of 1",
         {"WORKDIR": "{tmp}/work", "OUTPUT": "{tmp}/work"}),
    Case("an output in the working folder, beside its folders", 0, "best epoch 1 of 1",
         {"WORKDIR": "{tmp}/work", "OUTPUT": "{tmp}/work/running"}),
    Case("a name too long for the file system", 74, "File name too long", {"OUTPUT": "{tmp}/" + "o" * 300}),
    Case("a store without credentials", 77, "credentials are needed", {"TASKS": "s3://bucket/data"},
         environment={"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}),
    Case("a store that is not there", 74, "s3://bucket/data", {"TASKS": "s3://bucket/data"}, environment={
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "5ecre7",
        "AWS_MAX_ATTEMPTS": "1"}),
    Case("a store whose address is none", 78, "s3://bucket/data", {"TASKS": "s3://bucket/data"}, environment={
        "AWS_ENDPOINT_URL": "not an address", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "5ecre7"}),
    Case("authorities that are not there", 78, "AWS_CA_BUNDLE must be a file", {"TASKS": "s3://bucket/data"},
         environment={"AWS_CA_BUNDLE": "/nowhere.pem", "AWS_ENDPOINT_URL": "https://127.0.0.1:9"}),
    Case("authorities that are none", 78, "AWS_CA_BUNDLE must be a file of certificates", {"TASKS": "s3://bucket/data"},
         environment={"AWS_CA_BUNDLE": "/etc/passwd", "AWS_ENDPOINT_URL": "https://127.0.0.1:9"}),
]  # fmt: skip
