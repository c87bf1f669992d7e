"""Chat templates that show tools and calls as families of models do, in turns as the bundled one has."""

__all__ = ["LLAMA", "MISTRAL_ARGS", "MISTRAL_LIST"]

_TOOLS = """\
{%- if tools %}{{ '<|im_start|>system\\n' + HOW + '\\n' }}
{%- for tool in tools %}{{ (tool | tojson) + '\\n' }}{%- endfor %}{{ '<|im_end|>\\n' }}{%- endif %}
"""
_REST = """\
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}
"""

LLAMA = (
    """\
{%- set HOW = 'To call one answer {"name": its name, "parameters": its arguments}.' %}
"""
    + _TOOLS
    + """\
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|im_start|>assistant\\n{"name": "' + call.name + '", "parameters": ' }}
{{- (call.arguments | tojson) + '}<|im_end|>\\n' }}
"""
    + _REST
)

_CHECKED_IDS = """\
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{%- endif %}
"""

MISTRAL_LIST = (
    "{%- set HOW = '[AVAILABLE_TOOLS]' %}\n"
    + _TOOLS
    + """\
{%- for message in messages %}
{%- if message.tool_calls %}{{ '<|im_start|>assistant\\n[TOOL_CALLS] [' }}
"""
    + _CHECKED_IDS
    + """\
{{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}' }}
{%- if not loop.last %}{{ ', ' }}{%- endif %}
{%- endfor %}{{ ']<|im_end|>\\n' }}
"""
    + _REST
)

MISTRAL_ARGS = (
    "{%- set HOW = '[AVAILABLE_TOOLS]' %}\n"
    + _TOOLS
    + """\
{%- for message in messages %}
{%- if message.tool_calls %}{{ '<|im_start|>assistant\\n' }}
"""
    + _CHECKED_IDS
    + """\
{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}
{%- endfor %}{{ '<|im_end|>\\n' }}
"""
    + _REST
)
