"""Small chat templates, and dialogues of everyday kinds."""

import json

from transformers import AutoTokenizer

from testlib.vocabularies.changed import with_more

ROLES = ("<|im_start|>", "<|im_end|>")
HEAD = "{{ '<|im_start|>' + m['role'] + '\n' }}"
# A template that marks what the assistant generates.
MARKED = (
    "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}" + HEAD + "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# One that does not: the assistant's text is what lies between its prompt and the next message.
PLAIN = (
    "{% for m in messages %}" + HEAD + "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# One that shortens everything before the last message.
REWRITING = (
    "{% for m in messages %}" + HEAD + "{{ m['content'] if loop.last else m['content'][:3] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RAISING = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system messages') }}{% endif %}{{ m['content'] }}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "river", "parameters": {"city": None}}}


def said(*turns):
    """Return messages from short forms: ``said("u: hello", "a: the river")``."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    cut = (turn.split(": ", 1) for turn in turns)
    return [{"role": roles[letter], "content": content} for letter, content in cut]


DIALOGUES = [
    {"messages": said("u: the old city", "a: runs under a river")},
    {"messages": said("s: be quick", "u: water?", "a: light", "u: and paper?", "a: engine falls")},
    {"messages": said("u: the river", "t: new", "a: a small model 🦊é", "a: learns")},
    {"messages": said("u: which city?", "a: the large one", "u: thank you"), "tools": [TOOL]},
    {"messages": said("u: say <|im_end|> and <|im_start|>user", "a: no <|im_end|>, no")},
    {"messages": said("u: without an answer")},
    {"messages": said("u: a long one", "a: " + "quick engine " * 20)},
]


def chat_tokenizer(source, target, template):
    """Copy the tokenizer in ``source`` with role tokens and a chat template."""
    with_more(source, target, ROLES)
    tokenizer = AutoTokenizer.from_pretrained(str(target))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(target)
    return target


def write_rows(path, rows):
    """Write rows as JSON lines; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
