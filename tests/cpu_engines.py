# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
FSDP2 and DeepSpeed on the CPU, for tests.

accelerate turns both off where there is no accelerator: it calls several processes on CPUs `MULTI_CPU`, and leaves the
plugins out. Called `MULTI_GPU` with the backend gloo and the device "cpu", torch's FSDP2 and DeepSpeed themselves run
as they are. Only what accelerate thinks of the machine is made up here.
"""

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def pretend():
    """Makes accelerate take the CPU for an accelerator, in this process."""

    def prepare_backend(self, *args, **kwargs):
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self):
        self.device = torch.device("cpu")

    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device
