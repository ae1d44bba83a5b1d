#!/usr/bin/env bash
# The full reproduction as a list of jobs: every method on the tasks of its paper's tables, five seeds each.
#
#   bash run_all.sh            run the jobs that are not finished; the same command again goes on where it was
#   bash run_all.sh --quick    every method on hopper-mini-v0, seed 0: about an hour on one CPU core
#   bash run_all.sh --evidence the study: every method on both embedded tasks, seeds 0 to 9, from its backbone's
#                              checkpoint; results go to common/results.csv run by run, and what is there is not run again
#                              (a backbone only if OUT lacks its checkpoint: another machine's would not be the same)
#   bash run_all.sh --ablations  the papers' ablations on reacher-mini-v0, seeds 0 to 4, each from the checkpoint of its whole
#                              method in OUT; runs to OUT-ablations, results to common/ablations.csv in the same way. Frozen-
#                              Lake, Fig. 3c of DUAL: ENVS=frozenlake-8x8 METHODS="dual diffql" with --evidence, then dual here
#   bash run_all.sh --list     print a command per job instead, backbones first; --quick --list too
#   bash run_all.sh --help     this text
#
# Narrowed and tuned by variables in front, as in METHODS="iql *_dare" ENVS="hopper-*" SEEDS="0 1" bash run_all.sh:
#   METHODS  names of files in algorithms/, or patterns
#   ENVS     tasks, or patterns; each method takes those that its paper has, and hopper-mini-v0, reacher-mini-v0 if named
#   SEEDS    0 1 2 3 4 unless given: all papers average over five (DUAL's number did not survive; five there too)
#   JOBS     jobs at once, 1 unless given; all on one GPU, so with several GPUs use --list and a launcher
#   KEEP     a results.csv for the results of each job as it ends (--evidence: common/results.csv)
#   OUT      the --out-dir, runs unless given. Output of a job: OUT/logs/METHOD-ENV-SEED.log
#   EXTRA    more flags for every job
#   PYTHON   .venv/bin/python unless given, or python where that is missing
# Relative paths are relative to the folder of this script, wherever it is called from.
#
# A method that shares its backbone's offline phase (--from-offline) waits for it, or trains the backbone first if nobody
# does. Commands of the list can therefore run in any order, all at once, and again: a lock on the log file keeps two
# processes from one run (several machines: a file system with flock). The list does not change as jobs finish.
#   xargs:         bash run_all.sh --list | xargs -d '\n' -n 1 -P 4 bash -c
#   GNU parallel:  bash run_all.sh --list | parallel -j 4
#   Slurm, an array for some of the methods (most clusters refuse more than 1000 jobs in one):
#     export METHODS="iql calql"
#     sbatch --array=1-$(bash run_all.sh --list | wc -l) --gpus=1 --wrap \
#       'bash -c "$(bash run_all.sh --list | sed -n ${SLURM_ARRAY_TASK_ID}p)"'
#
# Exit codes: 0 all done; 1 some failed, listed at the end; 2 bad usage; 130, 143 stopped, with checkpoints written.
set -uf
cd -- "$(dirname -- "${BASH_SOURCE[0]}")" > /dev/null || exit 2
self=$PWD/${BASH_SOURCE[0]##*/}

# ---- what the papers report, baselines included ----
printf -v nine '%s ' {hopper,halfcheetah,walker2d}-{medium,medium-replay,medium-expert}-v2
printf -v twelve '%s ' $nine {hopper,halfcheetah,walker2d}-random-v2
printf -v maze2d '%s ' maze2d-{umaze,medium,large}-v1
printf -v small '%s ' antmaze-{umaze,umaze-diverse,medium-play,medium-diverse}-v2
printf -v large '%s ' antmaze-{medium,large}-{play,diverse}-v2
printf -v antmaze '%s ' $small antmaze-large-{play,diverse}-v2
printf -v human '%s ' {pen,door,relocate}-human-v1
printf -v cloned '%s ' {pen,door,hammer,relocate}-cloned-v1
printf -v walker2d '%s ' walker2d-{random,medium,medium-replay,medium-expert}-v2
printf -v four '%s ' {hopper,halfcheetah,walker2d}-medium-v2 halfcheetah-medium-replay-v2
printf -v shifted '%s ' halfcheetah-{friction,medium-replay-gravity}-2.0 hopper-kinematic-2.0 walker2d-morphology-2.0
embedded="hopper-mini-v0 reacher-mini-v0"
methods="" known="$embedded "
declare -A cost tasks
method() { methods+="$1 " known+="${*:3} " cost[$1]=$2 tasks[$1]=${*:3}; } # NAME HOURS TASKS...
# Hours on one core of an AVX2 CPU, as `python tests/bench.py --files` projects them for hopper-medium-v2, without the offline
# phase where it is imported; other machines and busy ones differ by a factor of two or so.
method iql             4 $twelve $antmaze $human $cloned
method calql           85 $twelve $maze2d $antmaze $cloned $shifted
method pex             5 $twelve $antmaze # CFDG Table 1; DARE Table 1
method wsrl            20 $walker2d # AD2S Table 6
method apl             337 $twelve # CFDG Table 1
method so2             330 $four $shifted # DUAL Table 2
method iql_dare        155 $nine $small # DARE Table 1
method calql_dare      171 $nine $small
method iql_stratdiff   137 $nine $small # StratDiff Table 1
method calql_stratdiff 154 $nine $small
method iql_synther     76 $twelve # CFDG Figures 2, 3
method synther         84 $twelve $maze2d # AD2S Table 1
method iql_edis        77 $twelve $antmaze $human $cloned # DARE 1; CFDG Figure 3, Table 4; DUAL Tables 1, 3
method edis            75 $twelve $maze2d $antmaze $cloned $shifted # DARE 1; AD2S 1, 5; DUAL 2, 3
method iql_cfdg        79 $twelve $large $human # CFDG Tables 1, 4
method pex_cfdg        80 $twelve $large # CFDG Table 1
method apl_cfdg        243 $twelve # CFDG Table 1
method calql_ad2s      101 $twelve $maze2d antmaze-umaze-diverse-v2 $large {pen,door}-cloned-v1 # AD2S Tables 1, 5
method iql_ad2s        88 $walker2d # AD2S Table 6
method wsrl_ad2s       95 $walker2d # AD2S Table 6
method dual            80 $nine $antmaze $cloned hopper-friction-2.0 frozenlake-8x8 # DUAL Tables 1, 3, 4, Fig. 3c
method calql_dual      254 $four $cloned $shifted # DUAL Tables 2, 3
method so2_dual        750 $four $shifted # DUAL Table 2
method diffql          40 $nine $antmaze $cloned $shifted frozenlake-8x8 # DUAL Tables 1, 2, 3, Fig. 3c
method dacer           23 $nine $antmaze $shifted # DUAL Tables 1, 2
method diffuser        650 $nine $antmaze # DUAL Table 1

backbone() { # of a method: whose offline phase it can start from; every dual.py trains an actor of its own
  case $1 in
    iql | calql | apl | wsrl | so2 | diffql | diffuser | *dual) ;;
    pex* | iql_*) echo iql ;;
    dacer) echo diffql ;;
    apl_* | wsrl_*) echo "${1%%_*}" ;;
    *) echo calql ;;
  esac
}
refuse() { echo "error: $1: got $2; allowed: $3" >&2; exit 2; }
among() { local p; for p in ${*:2}; do [[ $1 == $p ]] && return; done; return 1; } # NAME PATTERNS...
stop() { trap '' INT TERM HUP; kill -TERM $(jobs -p) 2> /dev/null; wait; flock -u 9 2> /dev/null; exit "$1"; }
trap 'stop 130' INT
trap 'stop 143' TERM HUP

# ---- one job ----
train() { # GOAL METHOD ENV SEED FLAGS...: until its run directory has the file GOAL; the program itself resumes
  local dir=$OUT/$2/$3/seed$4 rc=0
  exec 9>> "$OUT/logs/$2-$3-$4.log" # output and lock
  until flock -n 9; do # another process is at it
    [[ -f $dir/$1 ]] && return
    sleep 2 & wait $!
  done
  if [[ ! -f $dir/$1 ]]; then # a session of its own: Ctrl-C reaches it once, through stop, and it writes a checkpoint
    setsid $PYTHON "algorithms/$2.py" --env "$3" --seed "$4" --out-dir "$OUT" "${@:5}" $EXTRA < /dev/null >&9 2>&1 &
    wait $! || rc=$?
  fi
  flock -u 9
  return $rc
}
job() { # METHOD ENV SEED
  local base from=() rc=0
  [[ -f $OUT/$1/$2/seed$3/final.json ]] && echo "finished before: $*" && return
  echo "start: $*${WHOLE:+ $EXTRA}"
  base=$(backbone "$1")
  if [[ $WHOLE ]]; then # an ablation: the whole method first, with the same checkpoint
    [[ -f $WHOLE/$1/$2/seed$3/final.json ]] || (OUT=$WHOLE EXTRA="" WHOLE="" KEEP="" && job "$@") || return
    (OUT=$WHOLE WHOLE="" && keep "$@") || return
    from=(--from-offline "$WHOLE/$1/$2/seed$3")
  elif [[ $base ]]; then
    from=(--from-offline "$OUT/$base/$2/seed$3")
    [[ -f ${from[1]}/offline.pt ]] || train offline.pt "$base" "$2" "$3" || rc=$?
    (( rc == 0 )) || { echo "FAILED ($rc, its backbone): $*: $(tail -n 1 "$OUT/logs/$base-$2-$3.log")"; return $rc; }
    [[ ! -f ${from[1]}/final.json ]] || keep "$base" "$2" "$3" || return # of this checkpoint: the method's pair
  fi
  train final.json "$@" "${from[@]}" || rc=$?
  (( rc == 0 )) || { echo "FAILED ($rc): $*: $(tail -n 1 "$OUT/logs/$1-$2-$3.log")"; return $rc; }
  LC_ALL=C printf 'done: %s: score %.1f\n' "$*" \
    "$(sed -n 's/.*"final_score": \([^ ,}]*\).*/\1/p' "$OUT/$1/$2/seed$3/final.json")"
}
keep() { # METHOD ENV SEED: its result, to KEEP
  [[ ! $KEEP ]] || flock "${WHOLE:-$OUT}/logs/keep" $PYTHON -m common.tools.report "$OUT/$1/$2/seed$3" --keep "$KEEP"
}
kept() { # METHOD ENV SEED: a whole result is there
  [[ $KEEP && -f $KEEP ]] && grep -q "^$1,$2,$3,${WHOLE:+[^,]*,[^,]* $EXTRA,}.*,$" "$KEEP"
}

# ---- the command line ----
mode=run ablations=""
for word in "$@"; do
  case $word in
    --list | --job) mode=${word#--} ;;
    --quick) ENVS=hopper-mini-v0 SEEDS=${SEEDS:-0} ;;
    --evidence) ENVS=${ENVS:-$embedded} SEEDS=${SEEDS:-0 1 2 3 4 5 6 7 8 9} KEEP=${KEEP:-common/results.csv} ;;
    --ablations) ablations=yes ;;
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$self"; exit ;;
    *) [[ $mode == job ]] || refuse argument "$word" "--list, --quick, --evidence, --ablations, --help" ;;
  esac
done
carried=() # into the commands of the list
for name in OUT EXTRA PYTHON KEEP WHOLE; do [[ -z ${!name:-} ]] || carried+=("$name=${!name}"); done
export KEEP=${KEEP:-} WHOLE=${WHOLE:-} # WHOLE: of an ablation, the OUT with the whole methods
OUT=${OUT:-runs} EXTRA=${EXTRA:-} JOBS=${JOBS:-1} METHODS=${METHODS:-*} ENVS=${ENVS:-} SEEDS=${SEEDS:-0 1 2 3 4}
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python)}
for word in $EXTRA; do
  among "${word%%=*}" --env --seed --out-dir --dataset --from-offline --overwrite \
    && refuse EXTRA "$word" "flags that do not say which run it is"
done
writable() { mkdir -p "$OUT/logs" "${WHOLE:-$OUT}/logs" 2> /dev/null && [[ -w $OUT/logs ]] || refuse OUT "$OUT" "a folder that can be written"; }
if [[ $mode == job ]]; then
  [[ $# == 4 && $1 == --job && -n ${tasks[$2]:-} ]] || refuse arguments "$*" "--job METHOD ENV SEED"
  writable
  job "$2" "$3" "$4" && keep "$2" "$3" "$4"
  exit
fi
[[ ! $KEEP || ! $EXTRA || $WHOLE ]] || refuse EXTRA "$EXTRA" "nothing with KEEP, whose results are the files' own"
[[ $JOBS =~ ^[1-9][0-9]*$ ]] || refuse JOBS "$JOBS" "a number of jobs, from 1"
for seed in $SEEDS; do [[ $seed =~ ^(0|[1-9][0-9]*)$ ]] || refuse SEEDS "$seed" "numbers from 0, with blanks between"; done
for p in $METHODS; do
  for method in $methods -; do [[ $method == $p ]] && break; done
  [[ $method != - ]] || refuse METHODS "$p" "$methods"
done
for p in $ENVS; do
  for env in $known -; do [[ $env == $p ]] && break; done
  [[ $env != - ]] || refuse ENVS "$p" "$(printf '%s\n' $known | sort -u | xargs)"
done
if [[ $ablations ]]; then # this script again for each, with its flags and a folder of its own
  [[ ! $EXTRA ]] || refuse EXTRA "$EXTRA" "nothing with --ablations, which has flags of its own"
  whole=$OUT worst=0 some=""
  rows=$($PYTHON -m common.tools.ablations --list) || refuse PYTHON "$PYTHON" "one that has this project's packages"
  while IFS=$'\t' read -r method flags; do
    among "$method" $METHODS || continue
    some=yes
    WHOLE=$whole OUT=${whole%/}-ablations/${flags//[^a-z0-9.-]/_} EXTRA=$flags METHODS=$method SEEDS=$SEEDS JOBS=$JOBS \
      ENVS=${ENVS:-reacher-mini-v0} KEEP=${KEEP:-common/ablations.csv} bash "$self" $([[ $mode == list ]] && echo --list) &
    wait $! || worst=1
  done <<< "$rows"
  [[ $some ]] || refuse METHODS "$METHODS" "methods with ablations: $(cut -f 1 <<< "$rows" | sort -u | xargs)"
  exit $worst
fi

minis=""
for env in $embedded; do [[ " $ENVS " != *" $env "* ]] || minis+="$env "; done

todo=() minutes=0 before=0
for method in $methods; do
  among "$method" $METHODS || continue
  for seed in $(printf '%s\n' $SEEDS | sort -nu); do
    for env in ${tasks[$method]} $minis; do
      among "$env" ${ENVS:-*} || continue
      kept "$method" "$env" "$seed" && (( ++before )) && continue
      todo+=("$method $env $seed")
      [[ -f $OUT/$method/$env/seed$seed/final.json ]] && continue
      among "$env" $embedded "frozenlake-*" && (( minutes += 4 )) || (( minutes += 60 * cost[$method] ))
    done
  done
done
(( ${#todo[@]} || ! before )) || { echo "nothing left: $before results are in $KEEP"; exit; }
(( ${#todo[@]} )) || refuse "METHODS and ENVS" "$METHODS and $ENVS" "a task that one of the methods' papers has"
if [[ $mode == list ]]; then
  printf -v start '%q ' ${carried:+env "${carried[@]}"} bash "$self" --job
  for words in "${todo[@]}"; do echo "$start$words"; done
  exit
fi
writable
gpu=$($PYTHON -c 'import common.run, torch; print(torch.cuda.is_available())' 2> /dev/null) \
  || refuse PYTHON "$PYTHON" "one that has this project's packages: uv sync makes .venv"
echo "${#todo[@]} jobs, $JOBS at a time, in $OUT${KEEP:+; $before more are in $KEEP}"
(( minutes < 300 )) && left="$minutes minutes" || left="$((minutes / 60)) hours"
[[ $gpu == True ]] || echo "no GPU: about $left on one CPU core for what is left"
for words in "${todo[@]}"; do
  (( $(jobs -pr | wc -l) < JOBS )) || wait -n
  bash "$self" --job $words < /dev/null &
done
wait
failed=()
for words in "${todo[@]}"; do
  read -r method env seed <<< "$words"
  [[ -f $OUT/$method/$env/seed$seed/final.json ]] || failed+=("$words: $OUT/logs/${words// /-}.log")
done
echo "$((${#todo[@]} - ${#failed[@]})) of ${#todo[@]} jobs done, ${#failed[@]} failed"
(( ${#failed[@]} == 0 )) || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
