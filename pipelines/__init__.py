"""Single-file diffusers pipelines, installed as `vidaccel.pipelines`."""
