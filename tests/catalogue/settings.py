"""Settings that are wrong."""

from __future__ import annotations

import shutil

from tests.catalogue.case import Case


def wrong(name: str, value: str, told: str) -> Case:
    """A setting whose value is refused, and shown."""
    return Case(f"{name}={value[:20]}", 78, f"CROWDLAYER_{name}: {told}", {name: value}, shown=f", got '{value[:100]}")


NUMBER, INTEGER = "should be a valid number", "should be a valid integer"


PLACE, FORM = "must be a path or an s3:// URI", "must have the form s3://bucket"


SETTINGS = [
    Case("TASKS not set", 78, "CROWDLAYER_TASKS: must be set", {"TASKS": ""}),
    wrong("TASKS", "https://bucket/data", PLACE),
    wrong("TASKS", "s3:/bucket/data", PLACE),
    wrong("TASKS", "s3://", FORM),
    Case("TASKS with a signature", 78, "got 's3://bucket/data?***'", {"TASKS": "s3://bucket/data?X-Amz-Signature=5ecre7"}),
    Case("TASKS with credentials", 78, "got 's3://***@bucket/data'", {"TASKS": "s3://AKIA:5ecre7@bucket/data"}),
    Case("TASKS with a line break", 78, f"CROWDLAYER_TASKS: {PLACE}", {"TASKS": "/data\ncrowdlayer: done"}),
    Case("TASKS that is nowhere", 78, "TASKS: must be a folder, an s3:// URI or an archive", {"TASKS": "{tmp}/none"}),
    Case("TASKS that is a file", 78, "TASKS: must be a folder", {"TASKS": "{data}/answers.json"}),
    Case("TASKS that is no archive's", 78, "TASKS: must be a folder", {"TASKS": "{tmp}/none.tar"}),
    Case("TASKS that is a folder named as an archive", 78, "TASKS: must be", {"TASKS": "{tmp}/d.tar"},
         lambda data: shutil.copytree(data, data.parent / "d.tar")),
    wrong("ANSWERS", "ftp://answers.json", PLACE),
    Case("ANSWERS that are nowhere", 78, "ANSWERS: must be a file, there is none", {"ANSWERS": "{tmp}/none.json"}),
    Case("ANSWERS that are a folder", 78, "ANSWERS: must be a file, there is none", {"ANSWERS": "{data}"}),
    wrong("N_CLASSES", "1", "should be greater than or equal to 2"),
    wrong("N_CLASSES", "two", INTEGER),
    wrong("N_CLASSES", "3.5", INTEGER),
    wrong("N_CLASSES", "1000000000", "should be less than or equal to 100000"),
    Case("N_CLASSES that the folders contradict", 78, "N_CLASSES: must agree with the data set's 3 classes",
         {"N_CLASSES": "4"}),
    wrong("CLASSES", "cat", "must be at least two different names"),
    wrong("CLASSES", "cat,cat", "must be at least two different names"),
    wrong("CLASSES", "cat,,dog", "must be at least two different names"),
    Case("CLASSES that are half a list", 78, "CROWDLAYER_CLASSES: ", {"CLASSES": '["cat", "dog"'}),
    Case("CLASSES in lists in lists", 78, "CROWDLAYER_CLASSES: ", {"CLASSES": "[" * 100_000}),
    Case("CLASSES as many as N_CLASSES is not", 78, "CROWDLAYER_CLASSES: must be as many as n_classes=2",
         {"CLASSES": "blue,green,red", "N_CLASSES": "2"}),
    Case("CLASSES that are not the folders'", 65, "val/blue/: must be named for one of the classes",
         {"CLASSES": "cat,dog,cow"}),
    wrong("VAL_FRACTION", "0", "should be greater than 0"),
    wrong("VAL_FRACTION", "1", "should be less than 1"),
    Case("VAL_FRACTION=nan", 78, "CROWDLAYER_VAL_FRACTION: ", {"VAL_FRACTION": "nan"}),
    wrong("PATH_REMOVE", "gs://bucket/x", PLACE),
    Case("PATH_REMOVE that is nowhere", 78, "PATH_REMOVE: must be a file", {"PATH_REMOVE": "{tmp}/none.txt"}),
    Case("PATH_REMOVE of words", 65, "PATH_REMOVE answers.json: must hold two integers per line",
         {"PATH_REMOVE": "{data}/answers.json"}),
    wrong("MAX_BAD_IMAGES", "-1", "should be greater than or equal to 0"),
    wrong("MAX_BAD_IMAGES", "few", NUMBER),
    wrong("MAX_BAD_IMAGES", "2.5", "must be a share below 1 or a whole number of images"),
    wrong("MODEL", "resnet19", "is not a classification model of torchvision.models, did you mean resnet18?"),
    wrong("MODEL", "../resnet18", "is not a classification model of torchvision.models, did you mean resnet18?"),
    Case("MODEL that cannot take such images", 78, "IMG_SIZE", {"MODEL": "inception_v3", "IMG_SIZE": "16"}),
    Case("PRETRAINED from the web", 78, "CROWDLAYER_PRETRAINED: ", {"PRETRAINED": "https://host/resnet18.pth"}),
    Case("PRETRAINED that is nowhere", 78, "PRETRAINED: must be a file", {"PRETRAINED": "{tmp}/none.pth"}),
    Case("PRETRAINED that is no state dict", 78, "PRETRAINED", {"PRETRAINED": "{data}/answers.json"}),
    *(wrong(name, "maybe", "should be a valid boolean, unable to interpret input") for name in
      ("FREEZE", "DATA_AUGMENTATION", "VERBOSE")),
    *(Case(f"{name}=other", 78, f"CROWDLAYER_{name}: should be ", {name: "other"}) for name in (
        "SMALL_IMAGES", "CROWD_LAYER", "REGULARIZER", "LOSS_REDUCTION", "SELECT_BY", "OPTIMIZER", "SCHEDULER",
        "MIXED_PRECISION", "LOG_FORMAT")),
    Case("SELECT_BY accuracy without val/", 78, "SELECT_BY: accuracy needs true labels", {"SELECT_BY": "accuracy"},
         lambda data: shutil.rmtree(data / "val")),
    Case("MIXED_PRECISION of a GPU without one", 78, "MIXED_PRECISION: fp16 needs a GPU", {"MIXED_PRECISION": "fp16"}),
    wrong("SCALE", "-1", "should be greater than or equal to 0"),
    wrong("SCALE", "inf", "should be a finite number"),
    wrong("N_EPOCHS", "0", "should be greater than or equal to 1"),
    wrong("N_EPOCHS", "1e3", INTEGER),
    wrong("BATCH_SIZE", "0", "should be greater than or equal to 1"),
    wrong("LR", "0", "should be greater than 0"),
    Case("LR=nan", 78, "CROWDLAYER_LR: ", {"LR": "nan"}),
    wrong("LR", "0,1", NUMBER),
    Case("LR that blows up", 78, "lower LR=", {"LR": "1e30", "N_EPOCHS": "3"}),
    wrong("MOMENTUM", "1", "should be less than 1"),
    wrong("DECAY", "-0.1", "should be greater than or equal to 0"),
    wrong("LR_DECAY", "2", "should be less than or equal to 1"),
    Case("MILESTONES of words", 78, "CROWDLAYER_MILESTONES: ", {"MILESTONES": "soon"}),
    Case("MILESTONES before the first epoch", 78, "CROWDLAYER_MILESTONES: ", {"MILESTONES": "0,5"}),
    wrong("IMG_SIZE", "7", "should be greater than or equal to 8"),
    wrong("IMG_SIZE", "100000", "should be less than or equal to 4096"),
    wrong("SEED", "-1", "should be greater than or equal to 0"),
    wrong("SEED", "4294967296", "should be less than 4294967296"),
    Case("NUM_WORKERS=-1", 78, "CROWDLAYER_NUM_WORKERS: ", {"NUM_WORKERS": "-1"}),
    wrong("OUTPUT", "file:///tmp/out", PLACE),
    wrong("OUTPUT_NAME", "../out", "must be a file name"),
    wrong("OUTPUT_NAME", ".hidden", "must be a file name"),
    wrong("OUTPUT_NAME", "n" * 201, "must be a file name"),
    wrong("WORKDIR", "s3://bucket/work", "must be a folder on this machine"),
    Case("a setting that is not one", 78, "CROWDLAYER_LEARNING_RATE: is not a setting", {"LEARNING_RATE": "1"}),
    Case("a setting misspelt", 78, "CROWDLAYER_EPOCHS: is not a setting, did you mean CROWDLAYER_N_EPOCHS?",
         {"EPOCHS": "5"}),
    Case("a setting in small letters", 78, "crowdlayer_lr: is not a setting", environment={"crowdlayer_lr": "1"}),
    Case("an unknown argument", 78, "arguments: must be", arguments=("--chek",)),
    Case("a value that is no UTF-8", 78, "CROWDLAYER_OUTPUT_NAME: must be a file name", {"OUTPUT_NAME": "a\udcff"}),
    Case("a value of a megabyte", 78, "CROWDLAYER_MODEL: is not a classification model", {"MODEL": "m" * 100_000}),
    Case("thirty settings that are not one", 78, "and 10 more", {f"NO_SUCH_{i}": "1" for i in range(30)}),
]  # fmt: skip
