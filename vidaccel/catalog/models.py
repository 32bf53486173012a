"""The table of the models that have a name: one row each, with the settings that diffusers documents for it.

Sizes, steps, guidance and rates are those of the pipeline's signature and example in diffusers 0.42.1.
"""

from typing import Any

from vidaccel.catalog.spec import ASSET, GenerationDefaults, ModelSpec

EMBEDDED_MODEL = "wan-tiny"
EMBEDDED_STUDENT = "wan-tiny-causal"
EMBEDDED_TEACHER = "wan-tiny-causal-teacher"


def _hub(
    name: str,
    source: str,
    description: str,
    *,
    pipeline: str | None = None,
    size: tuple[int, int, int] = (81, 480, 832),
    **defaults: Any,
) -> ModelSpec:
    """A row of weights on the Hub; `size` is frames, height, width.

    With `pipeline` its settings are also those of folders of that pipeline that record none.
    """
    frames, height, width = size
    settings = GenerationDefaults(num_frames=frames, height=height, width=width, **defaults)
    return ModelSpec(name=name, source=source, description=description, pipeline=pipeline, defaults=settings)


def _student(name: str, description: str) -> ModelSpec:
    """A row of an embedded causal student."""
    defaults = GenerationDefaults(
        num_frames=97,
        height=128,
        width=128,
        guidance_scale=1.0,
        num_inference_steps=4,
        max_sequence_length=64,
    )
    return ModelSpec(name=name, source=ASSET + name, description=description, weights="trained", defaults=defaults)


MODELS: tuple[ModelSpec, ...] = (
    ModelSpec(
        name=EMBEDDED_MODEL,
        source=ASSET + EMBEDDED_MODEL,
        description="embedded: small Wan model of the storybook world, 128x128, runs on a CPU",
        weights="trained",
        defaults=GenerationDefaults(num_frames=49, height=128, width=128, max_sequence_length=64),
    ),
    _student(
        EMBEDDED_STUDENT, "embedded: causal student of the storybook world, for `vidaccel rollout`, runs on a CPU"
    ),
    _student(EMBEDDED_TEACHER, "embedded: a student by teacher forcing alone, for `vidaccel train context-forcing`"),
    _hub("wan2.1-t2v-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan2.1 text to video, 480p", pipeline="WanPipeline"),
    _hub("wan2.1-t2v-14b", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan2.1 text to video, 480p and 720p"),
    _hub(
        "wan2.1-i2v-14b-480p",
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "Wan2.1 image to video, 480p; needs --image",
        pipeline="WanImageToVideoPipeline",
    ),
    _hub(
        "wan2.1-i2v-14b-720p",
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        "Wan2.1 image to video, 720p; needs --image",
        size=(81, 720, 1280),
    ),
    _hub(
        "wan2.1-flf2v-14b-720p",
        "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
        "Wan2.1 first and last frame to video, 720p; needs --image and --last-image",
        size=(81, 720, 1280),
        guidance_scale=5.5,
    ),
    _hub(
        "wan2.1-vace-1.3b",
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        "Wan2.1 VACE, 480p; takes --video, --mask and --image as a reference",
        pipeline="WanVACEPipeline",
        num_inference_steps=30,
    ),
    _hub(
        "wan2.1-vace-14b",
        "Wan-AI/Wan2.1-VACE-14B-diffusers",
        "Wan2.1 VACE, 480p and 720p; takes --video, --mask and --image as a reference",
        num_inference_steps=30,
    ),
    _hub(
        "wan2.2-t2v-a14b",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "Wan2.2 text to video, two experts, 720p",
        size=(81, 720, 1280),
        guidance_scale=4.0,
        num_inference_steps=40,
    ),
    _hub(
        "wan2.2-i2v-a14b",
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "Wan2.2 image to video, two experts, 480p and 720p; needs --image",
    ),
    _hub(
        "wan2.2-ti2v-5b",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "Wan2.2 5B text to video, 720p at 24 frames a second",
        size=(121, 704, 1280),
        fps=24,
    ),
    _hub(
        "wan2.2-animate-14b",
        "Wan-AI/Wan2.2-Animate-14B-Diffusers",
        "Wan2.2 Animate; needs --image, --pose-video and --face-video",
        pipeline="WanAnimatePipeline",
        size=(77, 720, 1280),
        fps=30,
        guidance_scale=1.0,
        num_inference_steps=20,
    ),
    _hub(
        "hunyuanvideo",
        "hunyuanvideo-community/HunyuanVideo",
        "HunyuanVideo text to video, guidance distilled, 720p",
        pipeline="HunyuanVideoPipeline",
        size=(129, 720, 1280),
        fps=15,
        guidance_scale=6.0,
    ),
    _hub(
        "hunyuanvideo-i2v",
        "hunyuanvideo-community/HunyuanVideo-I2V",
        "HunyuanVideo image to video, 720p; needs --image",
        pipeline="HunyuanVideoImageToVideoPipeline",
        size=(129, 720, 1280),
        fps=15,
        guidance_scale=6.0,
    ),
    _hub(
        "hunyuanvideo-i2v-33ch",
        "hunyuanvideo-community/HunyuanVideo-I2V-33ch",
        "HunyuanVideo image to video by further channels, 720p; needs --image",
        size=(129, 720, 1280),
        fps=15,
        guidance_scale=1.0,
    ),
    _hub(
        "hunyuanvideo-1.5-t2v-480p",
        "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
        "HunyuanVideo 1.5 text to video, 480p",
        pipeline="HunyuanVideo15Pipeline",
        size=(121, 480, 848),
        fps=24,
        guidance_scale=None,
    ),
    _hub(
        "hunyuanvideo-1.5-i2v-480p",
        "hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v",
        "HunyuanVideo 1.5 image to video, 480p in the image's shape; needs --image",
        pipeline="HunyuanVideo15ImageToVideoPipeline",
        size=(121, 480, 848),
        fps=24,
        guidance_scale=None,
    ),
    _hub(
        "ltx-video",
        "Lightricks/LTX-Video",
        "LTX-Video text to video",
        pipeline="LTXPipeline",
        size=(161, 480, 704),
        fps=25,
        guidance_scale=3.0,
    ),
    _hub(
        "ltx-video-0.9.5",
        "Lightricks/LTX-Video-0.9.5",
        "LTX-Video text, image and video to video; takes --image or --video",
        pipeline="LTXConditionPipeline",
        size=(161, 512, 768),
        fps=25,
        guidance_scale=3.0,
        num_inference_steps=40,
    ),
    _hub(
        "ltx-2",
        "Lightricks/LTX-2",
        "LTX-2 text to video with sound",
        pipeline="LTX2Pipeline",
        size=(121, 512, 768),
        fps=24,
        guidance_scale=3.0,
        num_inference_steps=30,
    ),
    _hub(
        "cogvideox-2b",
        "THUDM/CogVideoX-2b",
        "CogVideoX text to video",
        pipeline="CogVideoXPipeline",
        size=(49, 480, 720),
        fps=8,
        guidance_scale=6.0,
    ),
    _hub(
        "cogvideox-5b",
        "THUDM/CogVideoX-5b",
        "CogVideoX text to video",
        size=(49, 480, 720),
        fps=8,
        guidance_scale=6.0,
    ),
    _hub(
        "cogvideox-5b-i2v",
        "THUDM/CogVideoX-5b-I2V",
        "CogVideoX image to video; needs --image",
        pipeline="CogVideoXImageToVideoPipeline",
        size=(49, 480, 720),
        fps=8,
        guidance_scale=6.0,
    ),
    _hub(
        "mochi-1-preview",
        "genmo/mochi-1-preview",
        "Mochi text to video",
        pipeline="MochiPipeline",
        size=(19, 480, 848),
        fps=30,
        guidance_scale=4.5,
        num_inference_steps=64,
    ),
    _hub(
        "allegro",
        "rhymes-ai/Allegro",
        "Allegro text to video, 720p",
        pipeline="AllegroPipeline",
        size=(88, 720, 1280),
        fps=15,
        guidance_scale=7.5,
        num_inference_steps=100,
    ),
    _hub(
        "skyreels-v2-t2v-14b-540p",
        "Skywork/SkyReels-V2-T2V-14B-540P-Diffusers",
        "SkyReels-V2 text to video, 540p",
        pipeline="SkyReelsV2Pipeline",
        size=(97, 544, 960),
        fps=24,
        guidance_scale=6.0,
    ),
    _hub(
        "skyreels-v2-i2v-14b-540p",
        "Skywork/SkyReels-V2-I2V-14B-540P-Diffusers",
        "SkyReels-V2 image to video, 540p; needs --image",
        pipeline="SkyReelsV2ImageToVideoPipeline",
        size=(97, 544, 960),
        fps=24,
    ),
    _hub(
        "skyreels-v2-df-1.3b-540p",
        "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
        "SkyReels-V2 diffusion forcing, text to video, 540p",
        pipeline="SkyReelsV2DiffusionForcingPipeline",
        size=(97, 544, 960),
        fps=24,
        guidance_scale=6.0,
    ),
    _hub(
        "helios-base",
        "BestWishYsh/Helios-Base",
        "Helios text to video, section by section",
        pipeline="HeliosPipeline",
        size=(132, 384, 640),
        fps=24,
    ),
    _hub(
        "cosmos-1-text2world-7b",
        "nvidia/Cosmos-1.0-Diffusion-7B-Text2World",
        "Cosmos 1 text to world, 704p",
        pipeline="CosmosTextToWorldPipeline",
        size=(121, 704, 1280),
        fps=30,
        guidance_scale=7.0,
        num_inference_steps=36,
    ),
    _hub(
        "cosmos-1-video2world-7b",
        "nvidia/Cosmos-1.0-Diffusion-7B-Video2World",
        "Cosmos 1 image or video to world, 704p; needs --image or --video",
        pipeline="CosmosVideoToWorldPipeline",
        size=(121, 704, 1280),
        fps=30,
        guidance_scale=7.0,
        num_inference_steps=36,
    ),
    _hub(
        "cosmos-predict2-2b",
        "nvidia/Cosmos-Predict2-2B-Video2World",
        "Cosmos Predict2 image or video to world, 704p; needs --image or --video",
        pipeline="Cosmos2VideoToWorldPipeline",
        size=(93, 704, 1280),
        guidance_scale=7.0,
        num_inference_steps=35,
    ),
    _hub(
        "kandinsky-5-t2v-lite",
        "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
        "Kandinsky 5 text to video",
        pipeline="Kandinsky5T2VPipeline",
        size=(121, 512, 768),
        fps=24,
    ),
    _hub(
        "kandinsky-5-i2v-pro",
        "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers",
        "Kandinsky 5 image to video; needs --image",
        pipeline="Kandinsky5I2VPipeline",
        size=(121, 512, 768),
        fps=24,
    ),
    _hub(
        "sana-video-2b-480p",
        "Efficient-Large-Model/SANA-Video_2B_480p_diffusers",
        "SANA-Video text to video, 480p",
        pipeline="SanaVideoPipeline",
        guidance_scale=6.0,
    ),
)
