//! What Linux says of a process: time, memory, threads, sockets. Shared by the benchmarks.

use std::fs;
use std::path::Path;

/// User and system time of a process so far, in milliseconds.
#[allow(dead_code, reason = "not every benchmark asks")]
pub(crate) fn cpu_ms(pid: u32) -> f64 {
    let stat = read(pid, "stat");
    // Fields count from behind the name, which may hold blanks; 14 and 15 of `proc_pid_stat(5)`.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect("they are numbers")).sum();
    let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    ticks as f64 * 1e3 / hertz as f64
}

/// Peak RSS of a process so far, in KiB.
pub(crate) fn rss_kib(pid: u32) -> u64 {
    number(&read(pid, "status"), "VmHWM:")
}

/// Threads of a process now.
#[allow(dead_code, reason = "not every benchmark asks")]
pub(crate) fn n_threads(pid: u32) -> u64 {
    number(&read(pid, "status"), "Threads:")
}

/// TCP connections of a process to a port of 127.0.0.1 that are open now.
#[allow(dead_code, reason = "not every benchmark asks")]
pub(crate) fn n_connections(pid: u32, port: u16) -> usize {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).expect("the process lives");
    let links = links.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let ours: Vec<String> = links
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.trim_end_matches(']').to_owned()))
        .collect();
    let remote = format!("0100007F:{port:04X}");
    let table = read(pid, "net/tcp");
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    // Remote address, state (01 is established) and inode of `proc_pid_net(5)`.
    rows.filter(|row| {
        row.len() > 9 && row[2] == remote && row[3] == "01" && ours.iter().any(|inode| inode == row[9])
    })
    .count()
}

fn number(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("Linux gives it");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("it is a number")
}

fn read(pid: u32, name: &str) -> String {
    fs::read_to_string(Path::new("/proc").join(pid.to_string()).join(name)).expect("the process lives")
}
