# coding=utf-8
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

"""The models of `scorers.py` but those of `reward_models.py`. torch and transformers take seconds to load."""

import importlib.util
import itertools
import sys
from pathlib import Path

import torch
from picture_records import digest_of_file
from preference_pairs import digest_part, one_line
from transformers import AutoModel, AutoProcessor


class CLIPSimilarity(torch.nn.Module):
    """Cosine of a CLIP's embeddings of prompt and picture, times `factor` or the model's own temperature."""

    def __init__(self, model, processor, factor=None):
        super().__init__()
        self.model = AutoModel.from_pretrained(model).eval()
        self.processor = AutoProcessor.from_pretrained(processor)
        self.factor = self.model.logit_scale.exp().item() if factor is None else factor
        digest = getattr(self.model.config, "_commit_hash", None) or digest_part(model)[:12]
        self.version = f"{model}@{digest}"

    def embed(self, prompts, images):
        """Unit vectors of prompts and of pictures, each of shape `(B, D)`."""
        inputs = self.processor(text=prompts, images=images, padding=True, truncation=True, return_tensors="pt")
        outputs = self.model(**inputs.to(self.model.device))
        return outputs.text_embeds, outputs.image_embeds

    def forward(self, prompts, images):
        return self.factor * torch.nn.functional.cosine_similarity(*self.embed(prompts, images))


def linear_layers(width):
    """The linear layers of LAION's aesthetic predictor and of ImageReward, by the numbers that they have in the files."""
    sizes = (width, 1024, 128, 64, 16, 1)
    linear = [torch.nn.Linear(*shape) for shape in zip(sizes, sizes[1:])]
    # There the first three are followed by dropout layers.
    dropouts = [torch.nn.Identity() for _ in range(3)]
    return torch.nn.Sequential(*itertools.chain(*zip(linear, dropouts)), *linear[3:])


class Aesthetic(CLIPSimilarity):
    """LAION's aesthetic predictor: linear layers on a picture's CLIP ViT-L/14 embedding. Scores are about 1 to 10."""

    def __init__(self, model, weights):
        super().__init__(model, model)
        self.head = linear_layers(self.model.config.projection_dim)
        state = torch.load(weights, map_location="cpu", weights_only=True)
        self.head.load_state_dict({name.removeprefix("layers."): value for name, value in state.items()})
        self.version = f"{Path(weights).name}@{digest_of_file(weights)[:12]}"

    def forward(self, prompts, images):
        _, pictures = self.embed(prompts, images)
        return self.head(pictures).flatten()


class OwnScorer(torch.nn.Module):
    """
    A function in a file of the user, `function(images, prompts)`, which returns a number for each picture. It is called with
    a list of RGB images and the list of their prompts.

    `version` has a digest of the file, not of other files that it imports.
    """

    def __init__(self, text):
        super().__init__()
        self.flag = f"--scorers {text}"
        file, _, function = text.rpartition(":")
        if not Path(file).is_file():
            raise ValueError(f"{self.flag}: there is no file {file}.")
        digest = digest_of_file(file)
        module = self.import_file(Path(file).resolve(), digest)
        self.function = getattr(module, function, None)
        if not callable(self.function):
            functions = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
            raise ValueError(
                f"{self.flag}: {file} has no function {function}. It has {', '.join(functions) or 'none'}."
            )
        self.version = f"{Path(file).name}:{function}@{digest[:12]}"

    def import_file(self, file, digest):
        """The module of a file, once for all of its functions. Its own folder is where it may import from, after others."""
        name = f"{file} {digest}"
        if name not in sys.modules:
            if str(file.parent) not in sys.path:
                sys.path.append(str(file.parent))
            spec = importlib.util.spec_from_file_location(name, file)
            # Dataclasses look for their module there.
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except Exception as error:
                del sys.modules[name]
                reason = f"{type(error).__name__}: {one_line(error)}"
                raise ValueError(f"{self.flag}: {file} cannot be imported: {reason}") from error
        return sys.modules[name]

    def forward(self, prompts, images):
        try:
            values = self.function(images, prompts)
        except Exception as error:
            # Not a `ValueError`, which would be printed as one line, without where in the user's file it came from.
            raise RuntimeError(
                f"{self.flag} failed for {len(images)} images, the first of {prompts[0]!r:.80}"
            ) from error
        try:
            scores = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.flag} returned {values!r:.80}, but must return one number for each image: {one_line(error)}"
            ) from error
        if scores.shape != (len(images),):
            raise ValueError(
                f"{self.flag} returned scores of shape {tuple(scores.shape)} for {len(images)} images, but must return one "
                "number for each image."
            )
        return scores
