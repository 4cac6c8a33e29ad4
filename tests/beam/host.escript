#!/usr/bin/env escript
%% The real host: a BEAM that runs a daemon exactly as CouchDB 1.1 to 2.2 runs an os_daemon.
%%
%%   host.escript INI TRANSCRIPT COMMAND…
%%
%% Opens COMMAND through a copy of couchspawnkillable with CouchDB's port options, answers get, register and log from
%% INI (read again at every get, so that edits are live), kills with the `kill -9 PID` line that the wrapper printed,
%% restarts at every exit, and halts the daemon after three exits within five seconds. A daemon that was killed by a
%% command below counts as an exit like any other, unless the command says `restart`, which is what CouchDB does
%% when a registered section changes: kill, start again, no exit counted.
%%
%% Obeys lines on its stdin, answers each with one line on stdout:
%%   restart              kill -9 and start again           -> restarted
%%   kill                 kill -9 from outside              -> killed
%%   kill N MIN MAX       N restarts, each after MIN to MAX milliseconds  -> kills begun; `kills done` when done
%%   close                close the port: CouchDB is gone   -> closed
%%   change SECTION KEY   restart if it is registered        -> restarted | not registered
%%   counts               -> counts starts=3 exits=1 kills=2 gets=17 registers=0 logs=40 invalid=0 lines=9 halted=false
%%                        (lines: of this life, the wrapper's own among them)
%%   exit                 stop the daemon as CouchDB does when [os_daemons] changes, then end
%% The end of stdin is CouchDB's own death: the port is closed, nothing is killed.
%% Unasked it says `started PID`, `exited STATUS`, `halted`. The TRANSCRIPT gets what CouchDB would log, a line each,
%% with milliseconds in front; `invalid` lines are those that CouchDB complains about.
%%
%% Source: couch_os_daemons.erl and couchspawnkillable.sh at 1.7.1 and 2.2.0; written anew. 2.x encodes with jiffy
%% and crashes on `["get",1]`; so does this one.

-mode(compile).

-define(PORT_OPTIONS, [stream, {line, 1024}, binary, exit_status, hide]).
-define(RETRIES, 3).
-define(RETRY_TIME_MS, 5000).

main([Ini, Transcript | Command]) when Command =/= [] ->
    process_flag(trap_exit, true),
    {ok, Log} = file:open(Transcript, [append, raw, {delayed_write, 1024, 20}]),
    Wrapper = wrapper(Transcript ++ ".spawnkillable"),
    Self = self(),
    spawn_link(fun() -> read_orders(Self) end),
    Counts = #{starts => 0, exits => 0, kills => 0, gets => 0, registers => 0, logs => 0, invalid => 0},
    State = #{
        ini => Ini, log => Log, command => Wrapper ++ " " ++ string:join(Command, " "), counts => Counts,
        port => none, pid => none, kill => undefined, buf => [], patterns => [], errors => [],
        status => stopped, lines => 0, kills_left => none, began => erlang:monotonic_time(millisecond)
    },
    loop(start(State));
main(_) ->
    io:format(standard_error, "usage: host.escript INI TRANSCRIPT COMMAND...~n", []),
    halt(2).

%% Prints the kill line, then becomes the daemon. As in CouchDB, words are split at blanks and nothing is quoted.
wrapper(Path) ->
    ok = file:write_file(Path, "#! /bin/sh -e\necho \"kill -9 $$\"\nexec $*\n"),
    ok = file:change_mode(Path, 8#755),
    filename:absname(Path).

read_orders(To) ->
    case io:get_line("") of
        Line when is_list(Line) -> To ! {order, string:lexemes(string:trim(Line), " ")}, read_orders(To);
        _ -> To ! {order, ["end"]}
    end.

start(#{command := Command} = State) ->
    Port = open_port({spawn, Command}, ?PORT_OPTIONS),
    {os_pid, Pid} = erlang:port_info(Port, os_pid),
    say("started ~b", [Pid]),
    count(starts, State#{port := Port, pid := Pid, kill := undefined, buf := [], lines := 0, status := running}).

loop(#{port := Port} = State) ->
    receive
        {Port, {data, {noeol, Data}}} ->
            loop(State#{buf := [Data | maps:get(buf, State)]});
        {Port, {data, {eol, Data}}} ->
            Line = iolist_to_binary(lists:reverse(maps:get(buf, State), [Data])),
            loop(take_line(Line, State#{buf := [], lines := maps:get(lines, State) + 1}));
        {Port, {exit_status, Status}} ->
            loop(exited(Status, State));
        {'EXIT', Port, _} ->
            loop(State);
        {'EXIT', _, normal} ->
            loop(State);
        kill_now ->
            loop(kill_next(State));
        {order, Order} ->
            loop(obey(Order, State));
        _Other ->
            %% What an earlier port still had to say.
            loop(State)
    end.

%% The first line is the kill command, whatever it says; the rest is the protocol.
take_line(Line, #{kill := undefined} = State) ->
    State#{kill := binary_to_list(Line)};
take_line(Line, State) ->
    case decode(Line) of
        {ok, Request} -> request(Request, State);
        error -> complain("Ignoring OS daemon request: ~ts", [Line], State)
    end.

request([<<"get">>, Section], State) when is_binary(Section) ->
    Pairs = maps:to_list(maps:get(Section, read_ini(State), #{})),
    answer(encode({Pairs}), count(gets, State));
request([<<"get">>, Section, Key], State) when is_binary(Section), is_binary(Key) ->
    answer(encode(maps:get(Key, maps:get(Section, read_ini(State), #{}), null)), count(gets, State));
request([<<"get">> | _] = Request, _State) ->
    %% The daemon manager of 2.x crashes here and takes every daemon along.
    error({manager_crashed, Request});
request([<<"register">>, Section], State) when is_binary(Section) ->
    count(registers, State#{patterns := [{Section} | maps:get(patterns, State)]});
request([<<"register">>, Section, Key], State) when is_binary(Section), is_binary(Key) ->
    count(registers, State#{patterns := [{Section, Key} | maps:get(patterns, State)]});
request([<<"log">>, Message], State) ->
    logged(Message, <<"info">>, State);
request([<<"log">>, Message, {Options}], State) ->
    logged(Message, proplists:get_value(<<"level">>, Options, <<"info">>), State);
request(Request, State) ->
    complain("Daemon made invalid request: ~tp", [Request], State).

logged(Message, _Level, State) when not is_binary(Message) ->
    complain("Invalid log message from daemon: ~tp", [Message], State);
logged(Message, Level, State) when Level =:= <<"debug">>; Level =:= <<"info">>; Level =:= <<"error">> ->
    write("[~ts] Daemon :: ~ts", [Level, Message], State),
    count(logs, State);
logged(Message, Level, State) ->
    logged(Message, <<"info">>, complain("Invalid log level from daemon: ~tp", [Level], State)).

answer(Json, #{port := Port} = State) ->
    %% A port that was killed a moment ago is closed.
    catch port_command(Port, [Json, $\n]),
    State.

complain(Format, Arguments, State) ->
    write("[error] invalid: " ++ Format, Arguments, State),
    count(invalid, State).

exited(Status, #{errors := Errors} = State) ->
    say("exited ~b", [Status]),
    write("[info] exited with status ~b", [Status], State),
    Now = erlang:monotonic_time(millisecond),
    Recent = [At || At <- [Now | Errors], Now - At =< ?RETRY_TIME_MS],
    Counted = count(exits, State#{errors := Recent}),
    case length(Recent) >= ?RETRIES of
        true ->
            say("halted", []),
            write("[error] halted", [], State),
            Counted#{status := halted, port := none};
        false ->
            start(Counted)
    end.

obey(["restart"], #{status := running} = State) ->
    Next = restart(State),
    say("restarted", []),
    Next;
obey(["kill"], #{status := running} = State) ->
    kill(State),
    say("killed", []),
    count(kills, State);
obey(["kill", N, Min, Max], State) ->
    say("kills begun", []),
    plan_kill(State#{kills_left := {list_to_integer(N), list_to_integer(Min), list_to_integer(Max)}});
obey(["change", Section, Key], #{patterns := Patterns} = State) ->
    Name = list_to_binary(Section),
    case lists:member({Name}, Patterns) orelse lists:member({Name, list_to_binary(Key)}, Patterns) of
        true -> Next = restart(State), say("restarted", []), Next;
        false -> say("not registered", []), State
    end;
obey(["close"], #{port := Port} = State) ->
    catch port_close(Port),
    say("closed", []),
    State#{port := none, status := stopped};
obey(["counts"], #{counts := Counts, status := Status, lines := Lines} = State) ->
    Texts = [io_lib:format("~s=~b ", [Name, maps:get(Name, Counts)])
        || Name <- [starts, exits, kills, gets, registers, logs, invalid]],
    say("counts ~slines=~b halted=~s", [Texts, Lines, Status =:= halted]),
    State;
obey(["exit"], #{status := Status, log := Log} = State) ->
    case Status of
        running -> kill(State);
        _ -> ok
    end,
    file:close(Log),
    halt(0);
obey(["end"], #{port := Port, log := Log}) ->
    catch port_close(Port),
    file:close(Log),
    halt(0);
obey(Order, State) ->
    say("not now: ~s", [string:join(Order, " ")]),
    State.

%% A registered section changed: killed at once, no end of stdin before, started again without counting an exit.
restart(#{port := Port} = State) ->
    kill(State),
    catch port_close(Port),
    start(count(kills, State)).

%% Before the wrapper's first line is here nothing can be killed by it; CouchDB closes the port then.
kill(#{kill := undefined, pid := Pid}) -> os:cmd("kill -9 " ++ integer_to_list(Pid));
kill(#{kill := Kill}) -> os:cmd(Kill).

plan_kill(#{kills_left := {0, _, _}} = State) ->
    say("kills done", []),
    State#{kills_left := none};
plan_kill(#{kills_left := {_, Min, Max}} = State) ->
    erlang:send_after(Min + rand:uniform(Max - Min + 1) - 1, self(), kill_now),
    State.

kill_next(#{kills_left := {N, Min, Max}, status := running} = State) ->
    plan_kill((restart(State))#{kills_left := {N - 1, Min, Max}});
kill_next(State) ->
    say("kills ended early", []),
    State#{kills_left := none}.

count(What, #{counts := Counts} = State) ->
    State#{counts := maps:update_with(What, fun(N) -> N + 1 end, Counts)}.

say(Format, Arguments) ->
    io:put_chars([io_lib:format(Format, Arguments), $\n]).

write(Format, Arguments, #{log := Log, began := Began}) ->
    At = erlang:monotonic_time(millisecond) - Began,
    Line = io_lib:format("~b " ++ Format ++ "~n", [At | Arguments]),
    ok = file:write(Log, unicode:characters_to_binary(Line)).

%% `[section]`, `key = value`, comments in lines of their own; ` ;` cuts a value, an empty value is none.
read_ini(#{ini := Path}) ->
    {ok, Text} = file:read_file(Path),
    {_, Sections} = lists:foldl(fun ini_line/2, {<<>>, #{}}, binary:split(Text, <<"\n">>, [global])),
    Sections.

ini_line(Raw, {Name, Sections}) ->
    case string:trim(Raw) of
        <<>> -> {Name, Sections};
        <<";", _/binary>> -> {Name, Sections};
        <<"[", Rest/binary>> -> {hd(binary:split(Rest, <<"]">>)), Sections};
        Line ->
            case binary:split(Line, <<"=">>) of
                [Key, Value] ->
                    [Cut | _] = binary:split(Value, <<" ;">>),
                    ini_set(Name, string:trim(Key), string:trim(Cut), Sections);
                _ -> {Name, Sections}
            end
    end.

ini_set(Name, _Key, <<>>, Sections) -> {Name, Sections};
ini_set(Name, Key, Value, Sections) ->
    {Name, Sections#{Name => maps:put(Key, Value, maps:get(Name, Sections, #{}))}}.

%% JSON as CouchDB's libraries give it: objects are {[{Key, Value}]}, strings binaries. OTP has none of its own before 27.
decode(Text) ->
    try value(space(Text)) of
        {Value, Rest} -> case space(Rest) of <<>> -> {ok, Value}; _ -> error end
    catch _:_ -> error
    end.

space(<<C, Rest/binary>>) when C =:= $\s; C =:= $\t; C =:= $\r; C =:= $\n -> space(Rest);
space(Text) -> Text.

value(<<"null", Rest/binary>>) -> {null, Rest};
value(<<"true", Rest/binary>>) -> {true, Rest};
value(<<"false", Rest/binary>>) -> {false, Rest};
value(<<$", Rest/binary>>) -> string(Rest, []);
value(<<$[, Rest/binary>>) -> items(space(Rest), $], fun value/1, []);
value(<<${, Rest/binary>>) ->
    {Pairs, After} = items(space(Rest), $}, fun pair/1, []),
    {{Pairs}, After};
value(Text) ->
    {match, [{0, Length}]} = re:run(Text, "^-?[0-9]+([.][0-9]+)?([eE][-+]?[0-9]+)?"),
    <<Number:Length/binary, Rest/binary>> = Text,
    {{number, Number}, Rest}.

pair(<<$", Text/binary>>) ->
    {Key, Rest} = string(Text, []),
    <<$:, After/binary>> = space(Rest),
    {Value, Last} = value(space(After)),
    {{Key, Value}, Last}.

items(<<Close, Rest/binary>>, Close, _Item, []) -> {[], Rest};
items(Text, Close, Item, Done) ->
    {One, Rest} = Item(space(Text)),
    case space(Rest) of
        <<$,, After/binary>> -> items(space(After), Close, Item, [One | Done]);
        <<Close, After/binary>> -> {lists:reverse(Done, [One]), After}
    end.

string(<<$", Rest/binary>>, Done) -> {unicode:characters_to_binary(lists:reverse(Done)), Rest};
string(<<"\\u", Hex:4/binary, Rest/binary>>, Done) ->
    case {binary_to_integer(Hex, 16), Rest} of
        {High, <<"\\u", Low:4/binary, After/binary>>} when High >= 16#d800, High < 16#dc00 ->
            Code = 16#10000 + ((High - 16#d800) bsl 10) + (binary_to_integer(Low, 16) - 16#dc00),
            string(After, [Code | Done]);
        {Code, _} -> string(Rest, [Code | Done])
    end;
string(<<$\\, C, Rest/binary>>, Done) ->
    #{C := Plain} = #{$" => $", $\\ => $\\, $/ => $/, $b => $\b, $f => $\f, $n => $\n, $r => $\r, $t => $\t},
    string(Rest, [Plain | Done]);
string(<<C/utf8, Rest/binary>>, Done) when C >= $\s -> string(Rest, [C | Done]).

encode(null) -> <<"null">>;
encode({Pairs}) -> [${, lists:join($,, [[encode(Key), $:, encode(Value)] || {Key, Value} <- Pairs]), $}];
encode(Text) -> [$", [escape(C) || C <- characters(Text)], $"].

%% A latin-1 byte in an ini file reaches the daemon as U+FFFD.
characters(<<C/utf8, Rest/binary>>) -> [C | characters(Rest)];
characters(<<_, Rest/binary>>) -> [16#fffd | characters(Rest)];
characters(<<>>) -> [].

escape($") -> <<"\\\"">>;
escape($\\) -> <<"\\\\">>;
escape(C) when C < $\s -> io_lib:format("\\u~4.16.0b", [C]);
escape(C) -> <<C/utf8>>.
