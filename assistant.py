"""A loaded model folder that answers: prompts, tiles, batched and streamed generation. For sample.py and eval.py."""
import collections

import torch

from data import Tokenizer, chat_ids
from model import decode, generate_stream
from vision import load_image, make_tiles
from weights import check_vocabulary, load_folder

class Assistant:
    """A loaded model folder with the settings of `generate`. Shapes: T tokens of a prompt, N tiles of side s."""
    def __init__(self, folder, device, dtype, vision=True, max_tiles=0, **settings):
        if not folder: raise ValueError("give a model folder with --model=DIR")
        (self.model, about), self.tokenizer = load_folder(folder, device, dtype, vision), Tokenizer(folder)
        if vision and self.model.vision is None:
            raise ValueError(f"{folder}: a language model without vision; give a whole model folder")
        check_vocabulary(self.model.llm, self.tokenizer)
        self.model.eval()
        self.settings = {"stop_ids": {self.tokenizer.eos_id}, **settings}
        self.template, self.thumbnail = about.get("template", "sailvl-chat"), about.get("use_thumbnail", True)
        self.max_tiles = max_tiles or about.get("max_dynamic_patch", 12)

    def tiles(self, path):
        """Picture file -> uint8 tiles (N, 3, s, s)."""
        return make_tiles(load_image(path), 1, self.max_tiles, self.model.vision.image_size, self.thumbnail)

    def prompt(self, turns, tiles):
        """[(question, answer), ..., (question, None)] and each picture's tiles -> (ids (T,), tiles (N, 3, s, s))."""
        counts, per_tile = [len(t) for t in tiles], self.model.vision.tokens_per_tile
        return chat_ids(self.tokenizer, self.template, turns, counts, per_tile), torch.cat(tiles) if tiles else None

    def ids_each(self, prompts, **settings):
        """An iterable of (ids, tiles) -> yield (number of the prompt, token ids of its answer), each when it is whole;
        one of max_new_tokens ids was cut off."""
        said = collections.defaultdict(list)
        for number, token in decode(self.model, prompts, **self.settings | settings):
            if token is None:
                yield number, said.pop(number, [])
            else:
                said[number].append(token)

    def answer_each(self, prompts, **settings):
        """An iterable of (ids, tiles) -> yield (number of the prompt, answer), each as soon as it is whole."""
        return ((number, self.tokenizer.decode(ids).strip()) for number, ids in self.ids_each(prompts, **settings))

    def answers(self, prompts, **settings):
        """[(ids, tiles), ...] -> their answers, all generated together."""
        return [text for _, text in sorted(self.answer_each(prompts, **settings))]

    def stream(self, ids, tiles):
        """Yield the answer piece by piece; a character of several tokens comes when it is whole."""
        said, shown, text = [], "", ""
        for token in generate_stream(self.model, ids, tiles, **self.settings):
            said.append(token)
            text = self.tokenizer.decode(said).strip()                 # closing spaces stay unsaid
            if len(text) > len(shown) and not text.endswith("\ufffd"):
                yield text[len(shown):]
                shown = text
        if text != shown: yield text[len(shown):]                      # a broken end
