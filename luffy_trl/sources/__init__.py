# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Who opens a slot of a group to tokens that the policy does not sample."""
