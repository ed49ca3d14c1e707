# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""A run as one HTML file: its curves, its groups, its recipe, and the tokens that teach."""
