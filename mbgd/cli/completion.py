"""`mbgd completion SHELL`: prints a script with which the shell completes commands, groups, choices and keys."""

import argparse

from mbgd.cli.commands import ON_WORKERS, TOOLS

DESCRIPTION = 'tab completion: eval "$(mbgd completion bash)", or zsh; mbgd completion fish | source'

COMMANDS = " ".join(("train", "new", "completion", *ON_WORKERS, *TOOLS))

BASH = """
_mbgd() {
    local line="${COMP_LINE:0:$COMP_POINT}" words
    read -ra words <<< "$line"
    case "$line" in *" ") words+=("") ;; esac
    local word="${words[-1]}"
    if [ "${#words[@]}" -le 2 ]; then
        COMPREPLY=($(compgen -W "COMMANDS" -- "$word"))
    elif [ "${words[1]}" = train ]; then
        COMPREPLY=($(compgen -W "$(COMP_LINE="${line#*mbgd }" mbgd train -sc query=bash 2>/dev/null)" -- "$word"))
        [[ "${COMPREPLY[*]}" == *[=./] ]] && compopt -o nospace 2>/dev/null
        # bash completes only the text after its last = or :
        local before="${word%"${word##*[=:]}"}"
        COMPREPLY=("${COMPREPLY[@]#"$before"}")
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}
complete -o default -F _mbgd mbgd
"""

ZSH = """
_mbgd() {
    local line="$LBUFFER"
    if (( CURRENT == 2 )); then
        compadd COMMANDS
    elif [[ "${words[2]}" == train ]]; then
        compadd -Q -S '' -- ${=$(COMP_LINE="${line#*mbgd }" mbgd train -sc query=bash 2>/dev/null)}
    else
        _files
    fi
}
compdef _mbgd mbgd
"""

FISH = """
function _mbgd_train
    set -lx COMP_LINE (string replace -r '^.*?mbgd ' '' -- (commandline -cp))
    mbgd train -sc query=fish 2>/dev/null
end
complete -c mbgd -n '__fish_is_first_arg' -x -a 'COMMANDS'
complete -c mbgd -n '__fish_seen_subcommand_from train' -x -a '(_mbgd_train)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SCRIPTS)


def main(parsed: argparse.Namespace) -> int:
    print(SCRIPTS[parsed.shell].replace("COMMANDS", COMMANDS).strip())
    return 0
