# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.
