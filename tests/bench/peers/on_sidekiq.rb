# frozen_string_literal: true

# The job of Sidekiq, and what puts it in: one line asks, one line says that it is done.

require "json"
require "sidekiq"

ASKED = JSON.parse(ENV.fetch("SQLA_RIVER_BENCH_ASKED"))
MARKS = File.open(File.join(ASKED["folder"], "marks"), File::WRONLY | File::APPEND | File::CREAT)

Sidekiq.configure_server { |config| config.redis = { url: ASKED["url"] } }
Sidekiq.configure_client { |config| config.redis = { url: ASKED["url"] } }

class Noop
  include Sidekiq::Worker

  def perform(_num, _t)
    MARKS.syswrite([Process.clock_gettime(Process::CLOCK_REALTIME)].pack("d"))
  end
end

if $PROGRAM_NAME == __FILE__
  $stdout.sync = true
  $stdin.each_line do |line|
    verb, first, count = line.split
    numbers = (first.to_i...(first.to_i + count.to_i))
    case verb
    when "fill" then Sidekiq::Client.push_bulk("class" => Noop, "args" => numbers.map { |number| [number, 0] })
    when "put" then numbers.each { |number| Noop.perform_async(number, 0) }
    end
    puts "done"
  end
end
