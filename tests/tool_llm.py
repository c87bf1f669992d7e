"""The bundled model with a chat template that knows tools, which its own does not."""

from kvkeep.llm import LLM

__all__ = ["tool_llm"]

_TEMPLATE = """\
{%- if tools -%}
{{- '<|im_start|>system\\nTools:' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function -%}
{{- '\\n<tool_call>\\n' -}}
{{- {'name': function.name, 'arguments': function.arguments} | tojson -}}
{{- '\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def tool_llm() -> LLM:
    """The model, small, with that template."""
    llm = LLM("tiny", capacity="64MB")
    assert llm.tokenizer is not None
    llm.tokenizer.chat_template = _TEMPLATE
    return llm
