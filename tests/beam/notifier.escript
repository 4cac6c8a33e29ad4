#!/usr/bin/env escript
%% CouchDB's end of an [update_notification] process: a BEAM that opens COMMAND exactly as CouchDB 1.x, 2.0 and 2.1 do,
%% and tells it of databases as fast as the pipe takes it.
%%
%%   notifier.escript COMMAND…
%%
%% Obeys lines on its stdin:
%%   push N DISTINCT NAME   N lines in turn about DISTINCT databases NAME-0, NAME-1, …   -> pushed MILLISECONDS
%%   line TEXT              this line, as it is                                          -> written
%%   kill                   the `kill -9 PID` that the wrapper printed                   -> killed
%%   close                  close the port: CouchDB is gone; waits for the process       -> gone MILLISECONDS | stays
%% The end of stdin ends it, and with it the port.
%% Unasked it says `started PID`, `said LINE` for whatever comes back, which kills the notifier on 1.x, and
%% `exited STATUS`. It never starts the command again: that is CouchDB's supervisor.
%%
%% Source: couch_os_process.erl and couchspawnkillable.sh at 1.7.1 and 2.1.2; written anew. As there, one process
%% writes, and waits while the port is busy.

-mode(compile).

-define(PORT_OPTIONS, [stream, {line, 4096}, binary, exit_status, hide]).
-define(STAYS_MS, 10000).

main(Command) when Command =/= [] ->
    process_flag(trap_exit, true),
    Wrapper = filename:join("/tmp", "couch-hookd-spawnkillable-" ++ os:getpid()),
    ok = file:write_file(Wrapper, "#! /bin/sh -e\necho \"kill -9 $$\"\nexec $*\n"),
    ok = file:change_mode(Wrapper, 8#755),
    Port = open_port({spawn, string:join([Wrapper | Command], " ")}, ?PORT_OPTIONS),
    {os_pid, Pid} = erlang:port_info(Port, os_pid),
    Kill = receive {Port, {data, {eol, Line}}} -> binary_to_list(Line) end,
    ok = file:delete(Wrapper),
    Self = self(),
    spawn_link(fun() -> read_orders(Self) end),
    say("started ~b", [Pid]),
    loop(#{port => Port, pid => Pid, kill => Kill});
main(_) ->
    io:format(standard_error, "usage: notifier.escript COMMAND...~n", []),
    halt(2).

read_orders(To) ->
    case io:get_line("") of
        Line when is_list(Line) -> To ! {order, string:trim(Line)}, read_orders(To);
        _ -> halt(0)
    end.

loop(#{port := Port} = State) ->
    receive
        {Port, {data, {_, Line}}} -> say("said ~ts", [Line]);
        {Port, {exit_status, Status}} -> say("exited ~b", [Status]);
        {order, Order} -> obey(string:lexemes(Order, " "), Order, State);
        _ -> ok
    end,
    loop(State).

obey(["push", N, Distinct, Name], _, #{port := Port}) ->
    Began = erlang:monotonic_time(millisecond),
    push(Port, 0, list_to_integer(N), list_to_integer(Distinct), Name),
    say("pushed ~b", [erlang:monotonic_time(millisecond) - Began]);
obey(["line" | _], "line " ++ Text, #{port := Port}) ->
    port_command(Port, [Text, $\n]),
    say("written", []);
obey(["kill"], _, #{kill := Kill}) ->
    os:cmd(Kill),
    say("killed", []);
obey(["close"], _, #{port := Port, pid := Pid}) ->
    Began = erlang:monotonic_time(millisecond),
    port_close(Port),
    wait_until_gone("/proc/" ++ integer_to_list(Pid), Began).

push(_, N, N, _, _) -> ok;
push(Port, I, N, Distinct, Name) ->
    Db = [Name, $-, integer_to_list(I rem Distinct)],
    true = port_command(Port, [<<"{\"type\":\"updated\",\"db\":\"">>, Db, <<"\"}">>, $\n]),
    push(Port, I + 1, N, Distinct, Name).

wait_until_gone(Path, Began) ->
    Took = erlang:monotonic_time(millisecond) - Began,
    case filelib:is_dir(Path) of
        false -> say("gone ~b", [Took]);
        true when Took > ?STAYS_MS -> say("stays", []);
        true -> receive after 5 -> wait_until_gone(Path, Began) end
    end.

say(Format, Arguments) ->
    io:put_chars([io_lib:format(Format, Arguments), $\n]).
