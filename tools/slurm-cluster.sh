#!/usr/bin/env bash
# A real Slurm cluster of four nodes on this one machine, up in a second or two, for the tests.
#
#   tools/slurm-cluster.sh install              # Debian's packages, those that are missing
#   tools/slurm-cluster.sh with COMMAND...      # start a cluster, run COMMAND on its login node, stop the cluster
#   tools/slurm-cluster.sh start DIRECTORY      # the same in three steps; DIRECTORY will hold all that is written
#   tools/slurm-cluster.sh run DIRECTORY COMMAND...
#   tools/slurm-cluster.sh stop DIRECTORY       # leaves DIRECTORY, with the logs, to its owner
#
# Each node has a network, an address and a host name of its own; files and programs are those of this machine. The
# cluster is one tree of processes in namespaces of its own: it ends with the first of them, and leaves nothing behind.
set -euo pipefail

NODES=4
PACKAGES=(slurm-wlm munge iproute2)
PROGRAMS=(slurmctld slurmd srun sbatch scontrol sinfo munged ip unshare nsenter setpriv setsid)
NAMESPACES=(--net --uts --mount --pid --fork --mount-proc --kill-child --propagation private)
PATH=$PATH:/usr/sbin:/sbin
SELF=$(readlink -f "${BASH_SOURCE[0]}")

fail() {
    printf 'slurm-cluster: %s\n' "$@" >&2
    exit 1
}

missing() {
    local program
    for program in "${PROGRAMS[@]}"; do
        command -v "$program" >/dev/null || printf ' %s' "$program"
    done
}

install() {
    if [[ -z $(missing) ]]; then return; fi
    [[ $(id -u) == 0 ]] || fail "installing ${PACKAGES[*]} needs root"
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${PACKAGES[@]}"
}

require() {
    local absent
    absent=$(missing)
    [[ -z $absent ]] || fail "there is no$absent here. On Debian and Ubuntu, as root: " \
        "    apt-get update && apt-get install --no-install-recommends ${PACKAGES[*]}"
    [[ $(id -u) == 0 ]] || fail "a cluster of network namespaces needs root: run the command with sudo, or in a container"
    unshare "${NAMESPACES[@]}" bash -c 'ip link add br0 type bridge && ip link add v1 type veth peer name eth0' ||
        fail "this machine does not let root make namespaces with a network in them. In a container, start it with" \
            "    --privileged    or    --cap-add SYS_ADMIN --cap-add NET_ADMIN --security-opt seccomp=unconfined" \
            "Elsewhere the kernel needs its modules bridge and veth."
}

configuration() {
    cat <<EOT
ClusterName=test
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job starts again when its old credential has expired.
AuthInfo=socket=$1/munge/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool/%n
SlurmctldPidFile=$1/slurmctld.pid
SlurmdPidFile=$1/slurmd-%n.pid
SlurmctldLogFile=$1/log/slurmctld.log
SlurmdLogFile=$1/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
# Batch, heterogeneous and requeued jobs wait for the next round of a scheduler: 3, 30 and 60 s by default.
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
ReturnToService=2
# Seconds from SIGTERM to SIGKILL: more than the 30 that are usual, for a machine that is busy.
KillWait=60
FirstJobId=1
PlugStackConfig=/dev/null
NodeName=node[1-$NODES] CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOT
}

addresses() {
    local i
    printf '%s\n' "127.0.0.1 localhost" "::1 localhost" "10.77.0.254 ctl"
    for ((i = 1; i <= NODES; i++)); do
        # The mapped address as well: c10d looks names up by it, and warns where it finds none.
        printf '%s\n' "10.77.0.$i node$i" "::ffff:10.77.0.$i node$i"
    done
}

# eventually SECONDS COMMAND...: repeat it until it succeeds.
eventually() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS > deadline)); then return 1; fi
        sleep 0.02
    done
}

# world DIRECTORY: the first process of the cluster, alone in its namespaces.
world() {
    local directory=$1 i pid
    cd "$directory"
    hostname ctl
    ip link set lo up
    ip link add br0 type bridge
    ip address add 10.77.0.254/24 dev br0
    ip link set br0 up
    addresses >hosts
    mount --bind hosts /etc/hosts
    munged --foreground --force --num-threads=4 --key-file="$directory/munge/munge.key" \
        --socket="$directory/munge/munge.sock" --pid-file="$directory/munge/munged.pid" \
        --log-file="$directory/munge/munged.log" --seed-file="$directory/munge/munged.seed" &
    eventually 20 test -S munge/munge.sock
    export SLURM_CONF=$directory/slurm.conf
    slurmctld -D -c &
    for ((i = 1; i <= NODES; i++)); do
        unshare --net --uts bash "$SELF" node "$i" &
        pid=$!
        eventually 20 in_another_network "$pid"
        ip link add "v$i" type veth peer name eth0 netns "$pid"
        ip link set "v$i" master br0 up
    done
    : >ready
    wait
}

in_another_network() {
    [[ $(readlink "/proc/$1/ns/net") != "$(readlink "/proc/$$/ns/net")" ]]
}

# node I: one node of the cluster.
node() {
    hostname "node$1"
    ip link set lo up
    eventually 20 ip link show eth0
    ip address add "10.77.0.$1/24" dev eth0
    ip link set eth0 up
    exec slurmd -D -N "node$1"
}

# start DIRECTORY [COMMAND...]: COMMAND starts what follows it.
start() {
    local directory=$1 outer i
    shift
    [[ $directory != *[[:space:]]* ]] || fail "a directory with blanks in its name is beyond slurm.conf: $directory"
    [[ ! -e $directory/slurm.conf ]] || fail "there is a cluster in $directory already; take another directory"
    mkdir -p "$directory"/{log,state,munge}
    for ((i = 1; i <= NODES; i++)); do mkdir -p "$directory/spool/node$i"; done
    chmod 700 "$directory/munge"
    (umask 077 && head -c 64 /dev/urandom >"$directory/munge/munge.key")
    configuration "$directory" >"$directory/slurm.conf"
    # A session of its own: Ctrl-C is not for the cluster.
    "$@" setsid unshare "${NAMESPACES[@]}" bash "$SELF" world "$directory" </dev/null >"$directory/log/world.log" 2>&1 &
    outer=$!
    if ! eventually 60 is_up "$directory" "$outer"; then
        kill -KILL "$outer" 2>/dev/null || true
        tail -n 20 "$directory"/log/* >&2
        fail "the cluster did not start; the ends of its logs are above"
    fi
}

is_up() {
    local inner=
    read -r inner <"/proc/$2/task/$2/children" || true # it has no end of line
    echo "$inner" >"$1/pid"
    [[ -n $inner && -e $1/ready && $(run "$1" sinfo --noheader --states=idle --format=%D) == "$NODES" ]]
}

# run DIRECTORY COMMAND...: on the login node, where slurmctld runs too.
run() {
    local directory=$1 pid
    shift
    pid=$(<"$directory/pid")
    exec nsenter --target "$pid" --net --uts --mount --pid \
        env --default-signal=INT,QUIT --chdir="$PWD" SLURM_CONF="$directory/slurm.conf" "$@"
}

stop() {
    local pid
    pid=$(cat "$1/pid" 2>/dev/null) || return 0
    kill -KILL "$pid" 2>/dev/null || true
    eventually 20 test ! -e "/proc/$pid"
}

# with COMMAND...: its exit status is ours.
with() {
    local command status=0
    require
    directory=$(mktemp --directory --tmpdir slurm-cluster-XXXXXXXX)
    trap 'stop "$directory"; rm -rf "$directory"' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # Should this script be killed outright, the cluster is killed too.
    start "$directory" setpriv --pdeathsig KILL
    # In the background, since bash hears signals at once only while it waits. Ctrl-C is for COMMAND, not for nsenter,
    # which would not wait for it.
    (trap '' INT QUIT && run "$directory" "$@") <&0 &
    command=$!
    # COMMAND hears Ctrl-C by itself, and is given the time to end in order.
    trap 'eventually 30 test ! -e "/proc/$command"; exit 130' INT
    wait "$command" || status=$?
    exit "$status"
}

case ${1-} in
    install | world | node) "$@" ;;
    with) [[ $# -ge 2 ]] || fail "with needs a command" && "$@" ;;
    start | stop | run)
        [[ $# -ge 2 ]] || fail "$1 needs a directory"
        [[ $1 != start ]] || require
        "$1" "$(readlink -m "$2")" "${@:3}"
        ;;
    *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$SELF" >&2; exit 2 ;;
esac
