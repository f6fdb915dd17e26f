# What the README of 0.1.0 showed, on a plan and a control image that the test gives.
import numpy as np

import car_runtime

shapes, scales = [], []
with car_runtime.open_plan(PLAN) as plan:
    result = plan.generate(CONTROL, label="cat", seed=7, n=4)
    shapes.append(result.images.shape)
    assert {"control", "condition", "decoder", "total"} <= set(result.timings)
    for step in plan.stream(CONTROL, label=2):
        scales.append(step.index)
        assert step.preview().shape == (1, *result.images.shape[1:])
    size = plan.manifest.model.image_size
    repaint = np.zeros((size, size), bool)
    repaint[:, size // 2 :] = True
    tokens = plan.encode(result.images[0])
    known = {"known_tokens": tokens, "known_mask": plan.known_mask(repaint)}
    shapes += [plan.generate(CONTROL, label=0, **known).images.shape, tokens.shape]
