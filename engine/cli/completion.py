"""Completion in bash: commands, options, and of training recipes, ``--set`` keys and values.

The script has all words in itself, so that completing starts no Python; it reads the names of
tasks, objectives and phases in the recipe that the command line names.
"""

from argparse import ArgumentParser
from collections.abc import Iterator, Mapping

from ..config import recipe as recipes
from ..config.messages import ANY_NAME
from .help import RecipeField, recipe_fields
from .options import parser

_SCRIPT = """\
# The names that recipe $1 gives in table $2: [tasks.NAME], or NAME.head = … within [tasks].
_superbert_names() {{
    local line within="" name='([A-Za-z0-9_-]+)'
    while read -r line; do
        [[ $line == "["* ]] && within=""
        [[ $line == "[$2]"* ]] && within=yes
        if [[ $line =~ ^"[$2."$name ]]; then echo "${{BASH_REMATCH[1]}}"
        elif [[ -n $within && $line =~ ^$name[.\\ =] ]]; then echo "${{BASH_REMATCH[1]}}"; fi
    done < "$1" | sort -u
}}
_superbert_keys() {{
    local key name
    printf '%s\\n' {keys}
    [[ -f $1 ]] || return
    for key in {named_keys}; do
        for name in $(_superbert_names "$1" "${{key%%.*}}"); do
            printf '%s\\n' "${{key/{any_name}/$name}}"
        done
    done
}}
_superbert_train() {{
    local line="${{COMP_WORDS[*]}}" current="${{COMP_WORDS[COMP_CWORD]}}"
    local before="${{COMP_WORDS[COMP_CWORD-1]}}" key="" word option="" recipe=""
    COMPREPLY=()
    [[ $line == "superbert train"* || $line == *" engine.train"* ||
        $line == *" superbert.engine.train"* ]] || return
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        [[ $word == --* ]] && option=$word
        [[ -z $recipe && $word == *.toml ]] && recipe=$word
        [[ -z $recipe && " {recipes} " == *" $word "* ]] && recipe="{folder}/$word.toml"
    done
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
        COMPREPLY=($(compgen -W "$(_superbert_keys "$recipe")" -S = -- "$current"))
    elif [[ -z $option ]]; then COMPREPLY=($(compgen -W "{recipes}" -- "$current")); fi
}}
complete -o default -F _superbert_train python python3 torchrun
"""

_COMMANDS = """\
_superbert() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" options=""
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{commands}" -- "$current"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
        train) _superbert_train; return ;;
{options}
    esac
    [[ $current != -* ]] || COMPREPLY=($(compgen -W "$options" -- "$current"))
}}
complete -o default -F _superbert superbert
"""


_VALUES = '        {}) COMPREPLY=($(compgen -W "{}" -- "$current")) ;;'


def bash_script() -> str:
    """Return the script."""
    fields = [*recipe_fields(), *_fields_of_phases()]
    values = [
        _VALUES.format(field.key.replace(ANY_NAME, "*"), " ".join(field.choices))
        for field in fields
        if field.choices
    ]
    return _SCRIPT.format(
        values="\n".join(values),
        options=_options(parser()),
        keys=" ".join(field.key for field in fields if ANY_NAME not in field.key),
        named_keys=" ".join(field.key for field in fields if field.key.count(ANY_NAME) == 1),
        any_name=ANY_NAME,
        recipes=" ".join(recipes.names()),
        folder=recipes.RECIPES,
    )


def bash_script_of_all(parsers: Mapping[str, ArgumentParser]) -> str:
    """Return the script for ``superbert COMMAND``, and for ``python -m engine.train``.

    Args:
        parsers: those of all commands.
    """
    options = [
        f'        {name}) options="{_options(made)}" ;;'
        for name, made in parsers.items()
        if name != "train"  # which has its own function
    ]
    return bash_script() + _COMMANDS.format(commands=" ".join(parsers), options="\n".join(options))


def _options(made: ArgumentParser) -> str:
    return " ".join(word for action in made._actions for word in action.option_strings)


def _fields_of_phases() -> Iterator[RecipeField]:
    for field in recipe_fields():
        if field.key.split(".")[0] in recipes.OF_A_PHASE:
            yield field._replace(key=f"phases.{ANY_NAME}.{field.key}")
