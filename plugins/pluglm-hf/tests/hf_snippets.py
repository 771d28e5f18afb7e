"""Programs as people write them for transformers, each a function of the library and the folders.

They cover what its pages on generation, caching and custom decoding show, in our own words. The same function runs
with `transformers` and with `pluglm_hf`; what it returns is compared.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch

TEXTS = ["hello world", "def f(x): return x + 1"]


def load(hf: Any, folders: dict[str, str], name: str = "llama") -> tuple[Any, Any]:
    door = hf.AutoModelForSeq2SeqLM if name == "t5" else hf.AutoModelForCausalLM
    return hf.AutoTokenizer.from_pretrained(folders[name]), door.from_pretrained(folders[name])


def greedy(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer("hello world", return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=12)
    return outputs, tokenizer.batch_decode(outputs, skip_special_tokens=True)


def batch_with_left_padding(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return inputs["input_ids"], inputs.attention_mask, model.generate(**inputs, max_new_tokens=9)


def old_spellings_of_loading(hf: Any, folders: dict[str, str]) -> Any:
    arguments = {} if hf.__name__ == "transformers" else {"torch_dtype": torch.float32, "use_flash_attention_2": False}
    model = hf.AutoModelForCausalLM.from_pretrained(
        folders["llama"], device_map={"": "cpu"} if arguments else None, low_cpu_mem_usage=True,
        attn_implementation="eager", local_files_only=True, **arguments,
    )  # fmt: skip
    return model.eval().to("cpu").generate(torch.tensor([[0, 5, 70]]), max_length=10)


def bfloat16(hf: Any, folders: dict[str, str]) -> Any:
    model = hf.AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16)
    return str(model.dtype), model.num_parameters(), model.config.num_hidden_layers, model.get_memory_footprint() > 0


def lengths(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return (
        model.generate(**inputs),  # nobody says how many: 20
        model.generate(**inputs, max_length=17),
        model.generate(**inputs, min_new_tokens=6, max_new_tokens=8),
        model.generate(**inputs, min_length=14, max_new_tokens=8, eos_token_id=[1, 149]),
        model.generate(**inputs, max_new_tokens=8, eos_token_id=149, pad_token_id=3),
    )


def settings_in_an_object(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    config = hf.GenerationConfig(max_new_tokens=7, num_beams=3, early_stopping=True, pad_token_id=2, eos_token_id=1)
    inputs = tokenizer("hello", return_tensors="pt")
    model.generation_config.max_new_tokens = 3
    model.generation_config.repetition_penalty = 1.2
    return model.generate(**inputs, generation_config=config), model.generate(**inputs)


def beams(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    best = model.generate(**inputs, num_beams=4, max_new_tokens=10)
    several = model.generate(
        **inputs, num_beams=4, num_return_sequences=3, length_penalty=0.4, early_stopping=True, max_new_tokens=10,
        eos_token_id=[1, 73],
    )  # fmt: skip
    return best, several


def penalties(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer("hello world", return_tensors="pt")
    tried = (
        {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[149], [82, 56]]},
        {"suppress_tokens": [82, 149, 253]}, {"begin_suppress_tokens": [82]}, {"forced_bos_token_id": 9},
        {"forced_eos_token_id": 1}, {"sequence_bias": [[[82], -9.0], [[40], 5.0]]}, {"renormalize_logits": True},
        {"exponential_decay_length_penalty": (3, 1.5)}, {"encoder_repetition_penalty": 1.4}, {"guidance_scale": 1.5},
    )  # fmt: skip
    return [model.generate(**inputs, max_new_tokens=8, **said) for said in tried]


def guided_away_from_a_prompt(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs, negative = tokenizer("hello world", return_tensors="pt"), tokenizer("def f", return_tensors="pt")
    return model.generate(
        **inputs, guidance_scale=1.7, negative_prompt_ids=negative.input_ids,
        negative_prompt_attention_mask=negative.attention_mask, max_new_tokens=8,
    )  # fmt: skip


def watermark(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer("hello world", return_tensors="pt")
    config = hf.WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")
    marked = model.generate(**inputs, watermarking_config=config, max_new_tokens=10)
    return marked, bool(torch.equal(marked, model.generate(**inputs, max_new_tokens=10)))


def draws_without_chance(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer("hello world", return_tensors="pt")
    torch.manual_seed(0)
    return model.generate(**inputs, do_sample=True, top_k=1, temperature=0.7, num_return_sequences=2, max_new_tokens=6)


def assistant(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    draft = hf.AutoModelForCausalLM.from_pretrained(folders["draft"])
    inputs = tokenizer("hello world", return_tensors="pt")
    return model.generate(**inputs, assistant_model=draft, num_assistant_tokens=4, max_new_tokens=14)


def prompt_lookup(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer("a b c a b c a b", return_tensors="pt")
    return model.generate(**inputs, prompt_lookup_num_tokens=3, max_new_tokens=14)


def static_cache(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer("hello world", return_tensors="pt")
    by_name = model.generate(**inputs, cache_implementation="static", max_new_tokens=8)
    cache = hf.StaticCache(config=model.config, max_cache_len=40)
    by_hand = model.generate(**inputs, past_key_values=cache, max_new_tokens=8)
    return by_name, by_hand, model.generate(**inputs, use_cache=False, max_new_tokens=8)


def chat_that_keeps_its_cache(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    cache, messages, seen = hf.DynamicCache(config=model.config), [], []
    for question in ("hello", "and this?", "a small text"):
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        outputs = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, eos_token_id=None)
        # The answer's own ids, so that the next turn continues what the cache holds.
        seen.append((outputs, cache.get_seq_length()))
        messages.append({"role": "assistant", "content": "ok"})
        cache.crop(-(cache.get_seq_length() - inputs["input_ids"].shape[1] + 2))
    return seen


def prefix_that_is_shared(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    prefix = tokenizer("def f(x): return", return_tensors="pt")
    cache = hf.DynamicCache(config=model.config)
    with torch.no_grad():
        cache = model(**prefix, past_key_values=cache).past_key_values
    answers = []
    for ending in (" x", " world", " small"):
        inputs = tokenizer("def f(x): return" + ending, return_tensors="pt")
        answers.append(model.generate(**inputs, past_key_values=copy.deepcopy(cache), max_new_tokens=5))
    return answers, cache.get_seq_length()


def loop_by_hand(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    ids = tokenizer("hello world", return_tensors="pt").input_ids
    cache, new = hf.DynamicCache(config=model.config), ids
    with torch.no_grad():
        for _ in range(6):
            outputs = model(new, past_key_values=cache, use_cache=True)
            new = outputs.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], dim=-1)
    return ids, cache.get_seq_length()


def forward_pass(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
    with torch.no_grad():
        outputs = model(**inputs, labels=labels, output_hidden_states=True, use_cache=False)
        last = model(**inputs, logits_to_keep=1).logits
        as_tuple = model(**inputs, use_cache=False, return_dict=False)
    real = inputs.attention_mask.bool()
    return outputs.loss, outputs.logits[real], outputs["logits"].shape, len(outputs.hidden_states), last, len(as_tuple)


def scores_of_the_choices(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer("hello world", return_tensors="pt")
    out = model.generate(
        **inputs, max_new_tokens=5, return_dict_in_generate=True, output_scores=True, output_logits=True,
        repetition_penalty=1.2,
    )  # fmt: skip
    transition = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    again = model.generate(
        torch.cat([out.sequences, torch.tensor([[7]])], -1), past_key_values=out.past_key_values, max_new_tokens=3
    )
    return out.sequences, torch.stack(out.scores), torch.stack(out.logits), transition, again


def scores_of_a_search(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    out = model.generate(
        **inputs, max_new_tokens=6, num_beams=3, num_return_sequences=2, return_dict_in_generate=True,
        output_scores=True, eos_token_id=73,
    )  # fmt: skip
    transition = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize_logits=False)
    return out.sequences, out.sequences_scores, out.beam_indices, transition


def hidden_states_of_a_step(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer("hello world", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True)
    return [[tuple(layer.shape) for layer in step] for step in out.hidden_states], out.hidden_states[1][-1]


def own_processor_and_criterion(hf: Any, folders: dict[str, str]) -> Any:
    class Never(hf.LogitsProcessor):
        def __init__(self, token: int) -> None:
            self.token = token

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            scores = scores.clone()
            scores[:, self.token] = -float("inf")
            return scores

    class AfterToken(hf.StoppingCriteria):
        def __init__(self, token: int) -> None:
            self.token = token

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return input_ids[:, -1] == self.token

    tokenizer, model = load(hf, folders)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    first = model.generate(**inputs, max_new_tokens=8)
    return model.generate(
        **inputs, max_new_tokens=8, logits_processor=hf.LogitsProcessorList([Never(int(first[0, 11]))]),
        stopping_criteria=hf.StoppingCriteriaList([AfterToken(int(first[1, 13]))]),
    )  # fmt: skip


def processors_in_place_of_fields(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer("hello world", return_tensors="pt")
    own = [hf.RepetitionPenaltyLogitsProcessor(1.9)]
    return (
        model.generate(**inputs, logits_processor=own, repetition_penalty=0.4, max_new_tokens=9),
        model.generate(**inputs, logits_processor=[hf.TopKLogitsWarper(1)], do_sample=True, max_new_tokens=9),
        model.generate(**inputs, logits_processor=[hf.SuppressTokensLogitsProcessor([82], device="cpu")],
                       suppress_tokens=[149], max_new_tokens=9),
    )  # fmt: skip


def allowed_tokens(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    allowed = ([20, 21, 22, 40], [60, 61, 90])
    return [
        model.generate(**inputs, prefix_allowed_tokens_fn=lambda row, ids: allowed[row], max_new_tokens=5, **said)
        for said in ({}, {"num_beams": 2})
    ]


def stop_strings(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer("hello world", return_tensors="pt")
    texts = tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40)[0, inputs.input_ids.shape[1] :, None])
    stop = next(text for text in texts[3:] if text.isascii() and text.strip())
    return model.generate(**inputs, stop_strings=[stop], tokenizer=tokenizer, max_new_tokens=40)


def streamer_to_the_terminal(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer("hello world", return_tensors="pt")
    model.generate(**inputs, streamer=hf.TextStreamer(tokenizer, skip_prompt=False), max_new_tokens=8)
    model.generate(
        **inputs, streamer=hf.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), max_new_tokens=8
    )


def streamer_to_another_thread(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    inputs = tokenizer("hello world", return_tensors="pt")
    streamer = hf.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, "max_new_tokens": 8})
    thread.start()
    text = "".join(streamer)
    thread.join()
    return text


def method_of_ones_own(hf: Any, folders: dict[str, str]) -> Any:
    def shortest(model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
                 **model_kwargs: Any) -> Any:  # fmt: skip
        while not stopping_criteria(input_ids, None).all():
            with torch.no_grad():
                logits = model(input_ids, use_cache=False).logits[:, -1]
            scores = logits_processor(input_ids, logits)
            input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], dim=-1)
        return input_ids

    tokenizer, model = load(hf, folders)
    inputs = tokenizer("hello world", return_tensors="pt")
    return model.generate(**inputs, custom_generate=shortest, max_new_tokens=6, repetition_penalty=1.3)


def encoder_decoder(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders, "t5")
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    encoded = model.get_encoder()(**inputs)
    out = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, output_scores=True)
    return (
        model.generate(**inputs, max_new_tokens=8), model.generate(**inputs, num_beams=3, max_new_tokens=8),
        model.generate(**inputs, decoder_input_ids=torch.tensor([[2, 60], [2, 61]]), max_new_tokens=4),
        model.generate(encoder_outputs=encoded, attention_mask=inputs.attention_mask, max_new_tokens=5),
        model.generate(
            **inputs, decoder_input_ids=torch.tensor([[60, 61]] * 2), max_new_tokens=4,
            decoder_attention_mask=torch.ones(2, 2, dtype=torch.long),
        ),
        torch.stack(out.scores), model.generate(**inputs, max_length=6), model.generate(**inputs, min_length=5, max_length=6),
    )  # fmt: skip


def encoder_decoder_passes(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders, "t5")
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        labels = torch.tensor([[5, 6, 7, -100], [8, 9, 10, 11]])
        trained = model(**inputs, labels=labels)
        first = model(**inputs, decoder_input_ids=torch.tensor([[2], [2]]), use_cache=True)
        second = model(
            encoder_outputs=(first.encoder_last_hidden_state,), attention_mask=inputs.attention_mask,
            decoder_input_ids=torch.tensor([[5], [8]]), past_key_values=first.past_key_values,
        )  # fmt: skip
    return trained.loss, trained.logits, first.logits, second.logits, second.past_key_values.get_seq_length()


def pipelines(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer, model = load(hf, folders)
    generator = hf.pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "hello"}]
    return (
        generator("hello world", max_new_tokens=6, do_sample=False),
        generator(TEXTS, max_new_tokens=6, do_sample=False, return_full_text=False),
        generator(chat, max_new_tokens=6, do_sample=False),
        generator("hello", max_new_tokens=4, do_sample=False, num_beams=3, num_return_sequences=2),
    )


def tokenizing(hf: Any, folders: dict[str, str]) -> Any:
    tokenizer = hf.AutoTokenizer.from_pretrained(folders["llama"])
    ids = tokenizer("naïve <|im_end|> 🙂")["input_ids"]
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "hello"}]
    return (
        ids, tokenizer.encode("hello", add_special_tokens=False), tokenizer.decode(ids),
        tokenizer.decode(ids, skip_special_tokens=True), tokenizer.decode(torch.tensor(ids)), len(tokenizer),
        tokenizer.vocab_size, tokenizer.eos_token, tokenizer.pad_token_id, tokenizer.convert_ids_to_tokens(ids),
        tokenizer.convert_tokens_to_ids(["h", "<|eos|>"]), tokenizer.all_special_ids, tokenizer.tokenize("hello world"),
        dict(tokenizer(TEXTS)), dict(tokenizer(TEXTS, padding="max_length", max_length=12, truncation=True)),
        dict(tokenizer(TEXTS, padding=True, padding_side="right", pad_to_multiple_of=8)),
        tokenizer(TEXTS[1], truncation=True, max_length=4)["input_ids"],
        tokenizer.apply_chat_template(chat, tokenize=False), tokenizer.apply_chat_template(chat)["input_ids"],
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"],
        tokenizer.apply_chat_template([chat, chat[:1]], padding=True, return_tensors="pt")["attention_mask"],
        tokenizer.pad({"input_ids": [[5, 6], [7]]}, return_tensors="pt")["input_ids"],
    )  # fmt: skip


SNIPPETS = [
    greedy, batch_with_left_padding, old_spellings_of_loading, bfloat16, lengths, settings_in_an_object, beams,
    penalties, guided_away_from_a_prompt, watermark, draws_without_chance, assistant, prompt_lookup, static_cache,
    chat_that_keeps_its_cache,
    prefix_that_is_shared, loop_by_hand, forward_pass, scores_of_the_choices, scores_of_a_search,
    hidden_states_of_a_step, own_processor_and_criterion, processors_in_place_of_fields, allowed_tokens, stop_strings, streamer_to_the_terminal,
    streamer_to_another_thread, method_of_ones_own, encoder_decoder, encoder_decoder_passes, pipelines, tokenizing,
]  # fmt: skip
