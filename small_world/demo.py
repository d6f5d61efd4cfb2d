# Copyright 2026 The NCP-DPO authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Preference training in minutes, on two cores and without a GPU: `python small_world/demo.py` writes to `demo/`.

A Stable Diffusion of two million parameters (`assets/small-world`) draws coloured shapes, well or badly. Pairs of its
pictures are labelled by a hidden preference: for sharp pictures of what was asked for, with a dark outline.
The demo then takes the way of README: `tools/prepare_preferences.py` checks the pairs and keeps those that an absolute winner
won, `tools/encode_preferences.py` encodes them, `train_ncp_dpo_sd15.py` trains a LoRA on them and measures held-out pairs, and
`tools/plot_run.py` draws what it measured. Other captions are then drawn with and without the LoRA, from the same noise.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import experiment
import plot_run
import protocol
from PIL import Image, ImageDraw, ImageFont
from scenes import RESOLUTION, reward

import diffusers


# The recommended method, a row of `protocol.METHODS`. tests/test_docs.py holds README and docs to its loss.
METHOD, LEARNING_RATE = "simpo-ncp-filtered", 2.5e-4
STEPS = (50, 100, 150, 200)
NUM_EVAL_PAIRS = 50
NUM_SHOWN = 12
START = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - START:4.0f} s] {text}", flush=True)


def save_before_after(scenes, before, after, path):
    """Saves one picture with two rows of enlarged pictures `(N, 3, H, W)` in [0, 1], under their captions."""
    side, margin, header = 112, 8, 44
    grid = Image.new("RGB", (len(scenes) * (side + margin) + margin, header + 2 * (side + 28)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    for column, scene in enumerate(scenes):
        draw.text((margin + column * (side + margin), 0), scene.caption.replace(" on ", "\non "), "black", font)
    for row, (title, pictures) in enumerate(
        {"Base model": before, "With the LoRA, from the same noise": after}.items()
    ):
        top = header + row * (side + 28)
        draw.text((margin, top - 14), title, "black", font)
        for column, picture in enumerate(experiment.to_pil(pictures[: len(scenes)])):
            enlarged = picture.resize((side, side), Image.Resampling.NEAREST)
            grid.paste(enlarged, (margin + column * (side + margin), top))
    grid.save(path)


def main(output_dir):
    diffusers.logging.set_verbosity_error()
    lora = output_dir / "lora"

    pipeline, explanations = experiment.load_measuring(experiment.ASSETS)
    # The experiment draws pairs in more steps, which takes longer.
    num_inference_steps = experiment.MEASURED_INFERENCE_STEPS
    _, _, test = protocol.split_scenes()

    say("1/5 The base model draws pictures. Pairs of them are labelled, checked and filtered")
    experiment.make_training_pairs(pipeline, explanations, output_dir, num_inference_steps)
    check = {"dataset_name": output_dir / "pairs", "resolution": RESOLUTION}
    experiment.run_script(experiment.prepare_preferences, check, "check")

    say("2/5 The base model draws captions that are not trained on")
    (output_dir / "prompts.txt").write_text("".join(f"{scene.caption}\n" for scene in test))
    pictures = {0: experiment.draw(pipeline, test, experiment.TEST_NOISE, num_inference_steps)}

    say("3/5 The pairs that an absolute winner won are encoded")
    experiment.encode_pairs(output_dir, "filtered")

    say("4/5 A LoRA is trained on them")
    # Otherwise training would resume the LoRA of an earlier demo.
    shutil.rmtree(lora, ignore_errors=True)
    settings = METHOD, LEARNING_RATE, protocol.BETA_DPO, protocol.SEED
    held_out = {"num_eval_pairs": NUM_EVAL_PAIRS, "validation_steps": STEPS[0]}
    experiment.train(experiment.training_options(output_dir, lora, *settings, STEPS) | held_out)
    experiment.run_script(plot_run, {}, str(lora))

    say("5/5 These captions are drawn with the LoRA, from the same noise")
    for step in STEPS:
        pipeline.load_lora_weights(lora / f"checkpoint-{step}", weight_name=experiment.trainer.WEIGHTS_NAME)
        pictures[step] = experiment.draw(pipeline, test, experiment.TEST_NOISE, num_inference_steps)
        pipeline.unload_lora_weights()
    save_before_after(test[:NUM_SHOWN], pictures[0], pictures[step], output_dir / "before_after.png")

    say("Done. How good the pictures are, from 0 to 1:\n")
    print(f"{'steps':>5}{'reward':>8}{'quality':>9}{'match':>7}{'style':>7}")
    rewards = {step: reward(drawn, test, explanations) for step, drawn in pictures.items()}
    for step, parts in rewards.items():
        total, quality, match, style = (values.mean() for values in (parts.total, *parts))
        print(f"{step:5}{total:8.3f}{quality:9.3f}{match:7.3f}{style:7.3f}")
    print(f"\nSee {output_dir / 'before_after.png'}, and {lora / 'run.png'} for the measurements of held-out pairs.")
    if rewards[step].total.mean() < rewards[0].total.mean() + 0.05:
        sys.exit("Failed: the LoRA has not learnt the preference.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("demo"), help="Folder for everything that the demo writes."
    )
    main(parser.parse_args().output_dir)
