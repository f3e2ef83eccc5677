CREATE TABLE `ended_sessions` (
	`subject` text PRIMARY KEY NOT NULL,
	`ended_at_ms` integer NOT NULL
);
--> statement-breakpoint
CREATE INDEX `ended_sessions_time` ON `ended_sessions` (`ended_at_ms`);