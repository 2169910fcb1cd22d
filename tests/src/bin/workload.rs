//! `gangway-workload`: the traffic of the lab, inside the guests and outside of them.

fn main() -> std::process::ExitCode {
    gangway_tests::workload::main()
}
