"""Completion of ``python -m engine.train`` in bash: options, recipes, ``--set`` keys and values.

The script holds all words itself, so that completing starts no Python.
"""

from collections.abc import Iterator

from . import recipe as recipes
from .fields import ANY_NAME, RecipeField, recipe_fields
from .options import parser

_SCRIPT = """\
_superbert_train() {{
    local line="${{COMP_WORDS[*]}}" current="${{COMP_WORDS[COMP_CWORD]}}"
    local before="${{COMP_WORDS[COMP_CWORD-1]}}" key="" word option=""
    COMPREPLY=()
    [[ $line == *" engine.train"* || $line == *" superbert.engine.train"* ]] || return
    for word in "${{COMP_WORDS[@]:0:COMP_CWORD}}"; do [[ $word == --* ]] && option=$word; done
    # Bash takes key=value apart into three words.
    if [[ $current == "=" ]]; then key=$before current=""
    elif [[ $before == "=" ]]; then key=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    if [[ -n $key ]]; then
        case $key in
{values}
        esac
    elif [[ $current == -* ]]; then COMPREPLY=($(compgen -W "{options}" -- "$current"))
    elif [[ $option == --set ]]; then
        compopt -o nospace
        COMPREPLY=($(compgen -W "{keys}" -S = -- "$current"))
    elif [[ -z $option ]]; then COMPREPLY=($(compgen -W "{recipes}" -- "$current")); fi
}}
complete -o default -F _superbert_train python python3
"""


_VALUES = '        {}) COMPREPLY=($(compgen -W "{}" -- "$current")) ;;'


def bash_script() -> str:
    """Return the script; tasks are those of the built-in recipes."""
    fields = list(_named_fields())
    values = [
        _VALUES.format(field.key, " ".join(field.choices)) for field in fields if field.choices
    ]
    options = [word for action in parser()._actions for word in action.option_strings]
    return _SCRIPT.format(
        values="\n".join(values),
        options=" ".join(options),
        keys=" ".join(field.key for field in fields),
        recipes=" ".join(recipes.names()),
    )


def _named_fields() -> Iterator[RecipeField]:
    tasks = sorted({task for name in recipes.names() for task in recipes.load(name).tasks})
    for field in recipe_fields():
        if field.key.startswith(f"tasks.{ANY_NAME}."):
            for task in tasks:
                yield field._replace(key=field.key.replace(ANY_NAME, task, 1))
        elif ANY_NAME not in field.key:
            yield field
